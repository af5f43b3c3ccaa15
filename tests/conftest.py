"""Shared fixtures: tiny random checkpoints, Medusa heads in every layout and a tokenizer, written where asked."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Tiny models: a second thread only spins, the more where other programs have the cores. Programs that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from safetensors.torch import load_file, save_file

HIDDEN, VOCAB = 64, 97
UNIT = Path(__file__).parent / "unit"
SERVERS = {"served", "fake_server", "triton", "openai_server", "_cluster"}  # fixtures that start one

CheckpointWriter = Callable[..., Path]
HeadTensors = Callable[..., dict[str, torch.Tensor]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test's place says whether it is a unit test, and its fixtures whether it starts a server."""
    for item in items:
        item.add_marker("unit" if item.path.is_relative_to(UNIT) else "integration")
        if SERVERS & set(getattr(item, "fixturenames", ())):
            item.add_marker("server")


@pytest.fixture(autouse=True, scope="session")
def _no_calibration_cache() -> Iterator[None]:
    """The user's cache is not touched, and no test finds what another one left; programs that tests start inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDUSA_EXPORT_CACHE", "off")
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_thread_for_graphs() -> Iterator[None]:
    """As OMP_NUM_THREADS for torch: ONNX Runtime's pool has one thread where an engine leaves the number open."""
    import onnxruntime

    set_sizes = onnxruntime.set_global_thread_pool_sizes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "set_global_thread_pool_sizes", lambda intra, inter: set_sizes(intra or 1, inter))
        yield


@pytest.fixture(autouse=True, scope="session")
def _signals_as_at_a_terminal() -> None:
    """A shell's & has SIGINT ignored, and what tests start would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _config(family: str, overrides: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    classes = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    values: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "qwen3":
        values["head_dim"] = 24  # not hidden / heads, as in the real Qwen3 models
    return classes[family](**{**values, **overrides})


@pytest.fixture
def tiny_checkpoint() -> CheckpointWriter:
    """``tiny_checkpoint(directory, family="llama", *, dtype, max_shard_size, seed, **config) -> directory``.

    A random two-layer model through ``save_pretrained``. Every parameter, norms and biases too, is random, so that one
    that is dropped or swapped changes the output. The same arguments always give the same weights.
    """

    def write(
        directory: Path,
        family: str = "llama",
        *,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "5GB",
        seed: int = 0,
        **overrides: Any,
    ) -> Path:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(_config(family, overrides))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.copy_(noise + 1.0 if name.endswith("norm.weight") else noise)
        model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
        return directory

    return write


def _head_tensors(
    num_heads: int = 3,
    num_layers: int = 1,
    *,
    hidden: int = HIDDEN,
    vocab: int = VOCAB,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    for head in range(num_heads):
        for layer in range(num_layers):
            shapes[f"medusa_heads.{head}.{layer}.linear.weight"] = (hidden, hidden)
            shapes[f"medusa_heads.{head}.{layer}.linear.bias"] = (hidden,)
        shapes[f"medusa_heads.{head}.{num_layers}.weight"] = (vocab, hidden)
    return {name: (torch.randn(shape, generator=generator) * 0.2).to(dtype) for name, shape in shapes.items()}


@pytest.fixture
def head_tensors() -> HeadTensors:
    """``head_tensors(num_heads=3, num_layers=1, *, hidden, vocab, dtype, seed)``: what ``tiny_heads`` writes."""
    return _head_tensors


@pytest.fixture
def tiny_heads() -> CheckpointWriter:
    """``tiny_heads(directory, layout="v1", num_heads=3, num_layers=1, *, suffix, **tensors) -> directory``.

    Layouts: "v1" (a head has its own lm_head), "v2" (it shares the base's), "vllm", and "modelopt", which adds the
    heads to the base checkpoint that already lies in ``directory``. ``suffix="pt"`` writes a pickle for v1 and v2.
    Further arguments (hidden, vocab, dtype, seed) go to ``head_tensors``.
    """

    def write(
        directory: Path,
        layout: str = "v1",
        num_heads: int = 3,
        num_layers: int = 1,
        *,
        suffix: str = "safetensors",
        **kwargs: Any,
    ) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        tensors = _head_tensors(num_heads, num_layers, **kwargs)
        if layout == "modelopt":
            _add_to_base(directory, tensors, num_heads, num_layers)
        elif layout == "vllm":
            _write_vllm(directory, tensors, num_heads, num_layers)
        else:
            _write_fasterdecoding(directory, tensors, layout, num_heads, num_layers, suffix)
        return directory

    return write


def _add_to_base(directory: Path, heads: dict[str, torch.Tensor], num_heads: int, num_layers: int) -> None:
    path = directory / "model.safetensors"
    save_file({**load_file(path), **heads}, path, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["medusa"] = {"num_medusa_heads": num_heads, "num_medusa_layers": num_layers}
    (directory / "config.json").write_text(json.dumps(config))


def _write_vllm(directory: Path, heads: dict[str, torch.Tensor], num_heads: int, num_layers: int) -> None:
    renamed = {}
    for name, tensor in heads.items():
        _, head, layer, *rest = name.split(".")
        is_lm_head = int(layer) == num_layers
        renamed[f"lm_heads.{head}.weight" if is_lm_head else f"blocks.{head}.layers.{layer}.{rest[-1]}"] = tensor
    save_file(renamed, directory / "model.safetensors")
    config = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "num_heads": num_heads,
        "num_hidden_layers": num_layers,
        "medusa_fc_bias": True,
    }
    (directory / "config.json").write_text(json.dumps(config))


def _write_fasterdecoding(
    directory: Path, heads: dict[str, torch.Tensor], layout: str, num_heads: int, num_layers: int, suffix: str
) -> None:
    tensors = {name.removeprefix("medusa_heads."): tensor for name, tensor in heads.items()}
    if layout == "v2":
        tensors = {name: tensor for name, tensor in tensors.items() if ".linear." in name}
    if suffix == "pt":
        torch.save(tensors, directory / "medusa_lm_head.pt")
    else:
        save_file(tensors, directory / "medusa_lm_head.safetensors")
    config: dict[str, Any] = {"medusa_num_heads": num_heads, "medusa_num_layers": num_layers}
    if layout == "v2":
        config["version"] = "2"
    (directory / "config.json").write_text(json.dumps(config))


@pytest.fixture
def tiny_tokenizer() -> CheckpointWriter:
    """``tiny_tokenizer(directory, *, chat_template=True) -> directory``: 97 ids, words ``w0 .. w91`` and 5 specials."""

    def write(directory: Path, *, chat_template: bool = True) -> Path:
        from tokenizers import Tokenizer
        from tokenizers.models import WordLevel
        from tokenizers.pre_tokenizers import WhitespaceSplit
        from transformers import PreTrainedTokenizerFast

        special = ["<unk>", "<s>", "</s>", "<user>", "<assistant>"]
        vocab = {word: index for index, word in enumerate([*special, *(f"w{i}" for i in range(VOCAB - len(special)))])}
        core = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
        core.pre_tokenizer = WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core,
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            additional_special_tokens=special[3:],
        )
        if chat_template:
            tokenizer.chat_template = (
                "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}"
                "{% if add_generation_prompt %}<assistant>{% endif %}"
            )
        tokenizer.save_pretrained(directory)
        return directory

    return write


@pytest.fixture
def predictable() -> Callable[..., None]:
    """``predictable(model_dir, heads_dir, noise=0.05, sharpness=1.0)``: edits both so that the heads draft well.

    The model walks a fixed cycle through the vocabulary, lightly disturbed by its layers, and head ``h`` knows the token
    ``h + 2`` ahead; no two heads agree. At ``sharpness`` 1 a drawn token is the best one; at 0.08 it often is not. For v1 heads and
    an untied lm_head.
    """

    def edit(model_dir: Path, heads_dir: Path, *, noise: float = 0.05, sharpness: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(5)
        model = load_file(model_dir / "model.safetensors")
        vocab, hidden = model["lm_head.weight"].shape
        cycle = torch.randperm(vocab, generator=generator)
        following = torch.empty_like(cycle)
        following[cycle] = cycle.roll(-1)  # the token after each token
        table = torch.randn(vocab, hidden, generator=generator)

        def ahead(steps: int) -> torch.Tensor:
            token = torch.arange(vocab)
            for _ in range(steps):
                token = following[token]
            weight = torch.empty_like(table)
            weight[token] = table
            return weight

        model["model.embed_tokens.weight"], model["lm_head.weight"] = table, sharpness * ahead(1)
        for name in model:
            if name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias")):
                model[name] = model[name] * noise
        save_file(
            {name: t.contiguous() for name, t in model.items()}, model_dir / "model.safetensors", {"format": "pt"}
        )
        path = heads_dir / "medusa_lm_head.safetensors"
        heads = load_file(path)
        for name in heads:
            heads[name] = heads[name] * noise if ".linear." in name else ahead(int(name.split(".")[0]) + 2)
        save_file(heads, path)

    return edit


@dataclass
class TinyEngine:
    """An ONNX Runtime engine of a tiny model, and what it was made from."""

    path: Path
    model_dir: Path
    heads_dir: Path
    checkpoint: Any
    scales: Any


@pytest.fixture
def tiny_engine(
    tmp_path: Path,
    tiny_checkpoint: CheckpointWriter,
    tiny_heads: CheckpointWriter,
    tiny_tokenizer: CheckpointWriter,
    predictable: Callable[..., None],
) -> Callable[..., TinyEngine]:
    """``tiny_engine(family="llama", quant="none", *, drafts_well, sharpness, tree, max_length, draft_vocab, heads, **config)``.

    ``drafts_well`` and ``sharpness`` go through ``predictable``; ``heads`` are arguments of ``tiny_heads`` and ``config`` those of
    ``tiny_checkpoint``. FP8 scales are the weights' true maxima; smoothing factors run from 0.8 to 1.25.
    """

    def make(
        family: str = "llama",
        quant: str = "none",
        *,
        drafts_well: bool = False,
        sharpness: float = 1.0,
        tree: Any = None,
        max_length: int = 128,
        draft_vocab: torch.Tensor | None = None,
        heads: dict[str, Any] | None = None,
        **config: Any,
    ) -> TinyEngine:
        from medusa_export.exporter.engine_dirs.onnxruntime import write_engine
        from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
        from medusa_export.heads.trees.tree import load_tree
        from medusa_export.quantize.formats import get_format
        from medusa_export.quantize.scales import Scales

        root = tmp_path / f"engine{len(list(tmp_path.iterdir()))}"
        model_dir = tiny_checkpoint(root / "model", family, **config)
        sizes = {"hidden": config.get("hidden_size", HIDDEN), "vocab": config.get("vocab_size", VOCAB)}
        heads_dir = tiny_heads(root / "heads", **(sizes | (heads or {})))
        if drafts_well:
            predictable(model_dir, heads_dir, sharpness=sharpness)
        checkpoint = MedusaCheckpoint.open(model_dir, heads_dir)
        linears = [name for name in checkpoint.names if name.endswith("proj.weight")]
        amax = {name.removesuffix(".weight"): float(checkpoint.read(name).abs().max()) for name in linears}
        smoothing = {
            name: torch.linspace(0.8, 1.25, checkpoint.shape(f"{name}.weight")[1]) for name in amax
        }  # one for all that have the same input
        scales = Scales(dict.fromkeys(amax, 8.0), amax, {}, smoothing)
        write_engine(
            root / "engine", checkpoint, get_format(quant), scales, tree=tree or load_tree("cpu-8"),
            max_length=max_length, draft_vocab=draft_vocab, save_tokenizer=tiny_tokenizer, source={"checkpoint": "tiny"},
        )  # fmt: skip
        return TinyEngine(root / "engine", model_dir, heads_dir, checkpoint, scales)

    return make


@pytest.fixture
def open_session() -> Callable[..., Any]:
    """``open_session(path, *, optimize=True)``: a plain ONNX Runtime session, on the pool that the engines set for the process."""

    def start(path: Path, *, optimize: bool = True) -> Any:
        import onnxruntime

        from medusa_export.engines.onnxruntime.engine import share_threads

        share_threads(onnxruntime, 0)
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = False
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    return start


STANDINS = Path(__file__).parent / "standins"


@pytest.fixture
def standin_tensorrt_llm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the package ``tensorrt_llm``, which is not here; what was asked of it. See tests/standins/tensorrt_llm.py."""
    spec = importlib.util.spec_from_file_location("standin_tensorrt_llm", STANDINS / "tensorrt_llm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module.install(monkeypatch)


@pytest.fixture
def standin_trtllm_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[str]]]:
    """A stand-in for ``trtllm-build`` on the path; a call gives the arguments of every run. See tests/standins/trtllm_build.py."""
    tools, record = tmp_path / "standin-bin", tmp_path / "standin-record"
    tools.mkdir()
    tool = tools / "trtllm-build"
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} {STANDINS / "trtllm_build.py"} "$@"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("STANDIN_RECORD", str(record))
    return lambda: [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
