"""Small exports to damage, each made by the real export from inputs of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from medusa_export.engines.serving.options import ServingOptions
from medusa_export.engines.serving.triton.repository import write_repository
from medusa_export.engines.serving.triton_trtllm.configs import TrtllmServing
from medusa_export.engines.serving.triton_trtllm.repository import write_trtllm_repository
from medusa_export.engines.tensorrt.build import TensorRtBuilder
from medusa_export.engines.tuning.auto import choose_tree
from medusa_export.engines.verify.selfcheck import check_engine
from medusa_export.exporter.job.arguments import ExportArguments
from medusa_export.exporter.pipeline.export import export
from medusa_export.heads.contract.engine_tools import EngineTools

HIDDEN, VOCAB, WORDS, HEADS = 64, 101, 97, 3


@dataclass(frozen=True)
class Kind:
    """One export.

    Attributes:
        config: of the model, besides the sizes here.
        arguments: of the export.
        repository: which Triton repository is made of it.
    """

    family: str
    config: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    repository: str = ""


KINDS: dict[str, Kind] = {
    "fp8, two ranks, engine": Kind("llama", {}, {"quant": "fp8", "kv_cache": "fp8", "tp": 2, "calib_prompts": 2}),
    "16 bit, tied, biases, engine": Kind("qwen2", {"tie_word_embeddings": True}, {"quant": "none"}),
    "int8_sq, heads too": Kind(
        "qwen3", {"head_dim": 32}, {"quant": "int8_sq", "quant_heads": True, "engine": "none", "calib_prompts": 2}
    ),
    "int8_sq, biases, engine": Kind("llama", {"mlp_bias": True}, {"quant": "int8_sq", "calib_prompts": 2}),
    "hf, fp8": Kind("llama", {}, {"quant": "fp8", "format": "hf", "kv_cache": "fp8", "calib_prompts": 2}),
    "heads alone": Kind("llama", {}, {"format": "medusa-v1"}),
    "Triton, python": Kind("llama", {}, {"quant": "none"}, "python"),
    "Triton, TensorRT-LLM": Kind("llama", {}, {"quant": "none"}, "tensorrt-llm"),
}  # fmt: skip


def make(kind: str, root: Path, seed: int = 0) -> Path:
    """Inputs in ``root``, and the export ``root/out``.

    Args:
        seed: of the weights; another one gives an export of the same shapes.
    """
    inputs(KINDS[kind], root, seed)
    return make_of(KINDS[kind], root)


def make_of(kind: Kind, root: Path) -> Path:
    """The export of inputs that are there, or the repository that is made of it."""
    arguments = {"ckpt": root / "model", "heads": root / "heads", "output": root / "out", **kind.arguments}
    export(ExportArguments(**arguments), EngineTools(check_engine, choose_tree, TensorRtBuilder()))
    if kind.repository:
        REPOSITORIES[kind.repository](root)
        return root / "repository"
    return root / "out"


def _python_repository(root: Path) -> None:
    write_repository(root / "out" / "engine", root / "repository", options=ServingOptions())


def _trtllm_repository(root: Path) -> None:
    """Of an engine directory whose engine is a stand-in: what was built is files to verify."""
    engine, made = root / "built", json.loads((root / "out/engine/engine.json").read_text())
    shutil.copytree(root / "out" / "tokenizer", engine)
    config = json.loads((root / "out/trtllm/config.json").read_text())
    numbers = {"max_batch_size": 4, "plugin_config": {"use_paged_context_fmha": True}}
    (engine / "medusa").mkdir()
    body = {"version": "1.2.1", "pretrained_config": config, "build_config": numbers}
    (engine / "medusa" / "config.json").write_text(json.dumps(body))
    (engine / "medusa" / "rank0.engine").write_text("a stand-in: no engine")
    shutil.copy(root / "out/tree.json", engine / "tree.json")
    (engine / "engine.json").write_text(json.dumps({**made, "backend": "tensorrt-llm", "precision": "16 bit"}))
    write_trtllm_repository(engine, root / "repository", TrtllmServing())


REPOSITORIES: dict[str, Callable[[Path], None]] = {"python": _python_repository, "tensorrt-llm": _trtllm_repository}


def inputs(kind: Kind, root: Path, seed: int = 0) -> None:
    """A model and heads for it, in ``root``."""
    _model(root / "model", kind, seed)
    _heads(root / "heads", seed)


def _model(path: Path, kind: Kind, seed: int) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": False,
    }  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind.family, **{**sizes, **kind.config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise + 1.0 if name.endswith("norm.weight") else noise)
    model.to(torch.float16).save_pretrained(path)
    _tokenizer(path)


def _heads(path: Path, seed: int) -> None:
    generator, tensors = torch.Generator().manual_seed(100 + seed), {}
    for head in range(HEADS):
        shapes = {"0.linear.weight": (HIDDEN, HIDDEN), "0.linear.bias": (HIDDEN,), "1.weight": (VOCAB, HIDDEN)}
        for name, shape in shapes.items():
            tensors[f"{head}.{name}"] = (torch.randn(shape, generator=generator) * 0.2).to(torch.float16)
    path.mkdir(parents=True)
    save_file(tensors, path / "medusa_lm_head.safetensors")
    (path / "config.json").write_text('{"medusa_num_heads": 3, "medusa_num_layers": 1}')


def _tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<user>", "<assistant>"]
    words = [*special, *(f"w{index}" for index in range(WORDS - len(special)))]
    core = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special[3:],
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(path)
