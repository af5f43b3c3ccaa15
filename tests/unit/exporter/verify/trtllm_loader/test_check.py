"""The load check takes everything that the writer writes, and names every fault that was put in on purpose."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_export.exporter.plan.spec import ExportSpec
from medusa_export.exporter.plan.trtllm_config import trtllm_config
from medusa_export.exporter.plan.trtllm_layout import plan_ranks
from medusa_export.exporter.verify.trtllm_loader.check import load_notes, load_problems
from medusa_export.exporter.verify.trtllm_loader.config import config_problems
from medusa_export.exporter.verify.trtllm_loader.modules import required_tensors
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.quantize.formats import FORMATS, KV_CACHE

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], object]
L0 = "transformer.layers.0."
HEAD = "medusa_heads.1.medusa_layers.0.linear"
SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 97, "torch_dtype": "float16",
}  # fmt: skip
WIDE: dict[str, Any] = {**SMALL, "hidden_size": 512, "intermediate_size": 512, "head_dim": 128, "vocab_size": 512}
LLAMA_FP8: dict[str, Any] = {
    "architecture": "MedusaForCausalLM", "model_type": "llama", "dtype": "bfloat16", "vocab_size": 13, "hidden_size": 8,
    "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_size": 6,
    "hidden_act": "silu", "norm_epsilon": 1e-5, "position_embedding_type": "rope_gpt_neox", "rotary_base": 1e4,
    "max_position_embeddings": 64, "attn_bias": False, "mlp_bias": False, "num_medusa_heads": 1, "num_medusa_layers": 1,
    "max_draft_len": 2, "mapping": {"world_size": 4, "tp_size": 4, "pp_size": 1},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
}  # fmt: skip


def edit(out: Path, change: Change, rank: int = 0) -> None:
    tensors = load_file(out / f"rank{rank}.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / f"rank{rank}.safetensors")


def edit_config(out: Path, **changes: Any) -> None:
    """Top-level keys, and ``quantization__key`` for those of a section; None removes one."""
    config = json.loads((out / "config.json").read_text())
    for key, value in changes.items():
        section, _, inner = key.rpartition("__")
        into = config[section] if section else config
        into.pop(inner, None)
        if value is not None:
            into[inner] = value
    (out / "config.json").write_text(json.dumps(config))


def test_a_layer_by_hand() -> None:
    """Four ranks of 4 query and 2 key/value heads of 6: each has one query head, and half of the ranks the same key head."""
    fp8, scale = "float8_e4m3fn", ("float32", (1,))

    def linear(name: str, shape: tuple[int, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
        scales = {f"{name}.{which}_scaling_factor": scale for which in ("weights", "activation")}
        return {f"{name}.weight": (fp8, shape), **scales}

    expected: dict[str, Any] = {
        "transformer.vocab_embedding.weight": ("bfloat16", (13, 8)),
        f"{L0}input_layernorm.weight": ("bfloat16", (8,)),
        **linear(f"{L0}attention.qkv", (18, 8)),
        **linear(f"{L0}attention.dense", (8, 6)),
        f"{L0}attention.kv_cache_scaling_factor": scale,
        f"{L0}post_layernorm.weight": ("bfloat16", (8,)),
        **linear(f"{L0}mlp.fc", (3, 8)),
        **linear(f"{L0}mlp.gate", (3, 8)),
        **linear(f"{L0}mlp.proj", (8, 3)),
        "transformer.ln_f.weight": ("bfloat16", (8,)),
        "lm_head.weight": ("bfloat16", (4, 8)),  # 13 words padded to 16
        **linear("medusa_heads.0.medusa_layers.0.linear", (2, 8)),  # the default list does not cover it
        "medusa_heads.0.medusa_layers.0.linear.bias": ("bfloat16", (2,)),
        "medusa_heads.0.lm_head.weight": ("bfloat16", (4, 8)),
    }
    assert required_tensors(LLAMA_FP8) == expected
    assert config_problems(LLAMA_FP8) == []


def write_zeros(out: Path, weight_format: str, family: str = "llama", **options: Any) -> Path:
    """What the writer writes, but for the values: its config.json, and its plan's tensors filled with zeros."""
    form = FORMATS[weight_format]
    sizes = WIDE if form.trtllm.multiple > 1 or form.trtllm.rank_tile != (1, 1) else SMALL
    config = DecoderConfig.from_dict({"model_type": family, **sizes})
    flags = {"tp": 2, "kv_cache": "fp8", "quant_heads": False, "exclude": (), **options}
    spec = ExportSpec(
        config,
        2,
        1,
        7,
        flags["tp"],
        form,
        "float16",
        KV_CACHE[flags["kv_cache"]],
        flags["quant_heads"],
        flags["exclude"],
    )
    out.mkdir()
    (out / "config.json").write_text(json.dumps(trtllm_config(spec)))
    for rank, plan in enumerate(plan_ranks(spec)):
        tensors = {each.name: torch.zeros(each.shape, dtype=getattr(torch, each.dtype)) for each in plan.tensors}
        save_file(tensors, out / f"rank{rank}.safetensors")
    return out


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=lambda weight_format: weight_format.name)
def test_takes_what_the_writer_writes(family: str, weight_format: Any, tmp_path: Path) -> None:
    for kv_cache, tp in zip(KV_CACHE, (1, 2, 4), strict=True):
        options: dict[str, Any] = {
            "tp": tp,
            "kv_cache": kv_cache,
            "quant_heads": weight_format.quantizes_heads and tp < 4,
        }
        if weight_format.trtllm.excludable:
            options["exclude"] = ("*mlp.proj*",) if tp == 2 else ()
        out = write_zeros(tmp_path / f"{tp}-{kv_cache}", weight_format.name, family, **options)
        assert load_problems(out) == []


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """``written(weight_format="fp8", family="llama", **options) -> directory``: two ranks with an FP8 cache."""

    def write(weight_format: str = "fp8", family: str = "llama", **options: Any) -> Path:
        out = write_zeros(tmp_path / "out", weight_format, family, **options)
        assert load_problems(out) == []
        return out

    return write


def drop(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def cast(name: str, dtype: torch.dtype) -> Change:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


def cut(name: str) -> Change:
    return lambda tensors: tensors.update({name: tensors[name].view(torch.int8)[1:].view(tensors[name].dtype)})


def add(name: str, *shape: int) -> Change:
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=torch.float16)})


SILENT = "would leave it random without a word"
TENSOR_FAULTS: dict[str, tuple[Change, str]] = {
    "no head lm_head": (drop("medusa_heads.1.lm_head.weight"), f"medusa_heads.1.lm_head.weight is missing; .*{SILENT}"),
    "no lm_head": (drop("lm_head.weight"), f" lm_head.weight is missing; .*{SILENT}"),
    "no head bias": (drop(f"{HEAD}.bias"), f"{HEAD}.bias is missing$"),
    "no scale": (drop(f"{L0}mlp.fc.activation_scaling_factor"), "mlp.fc.activation_scaling_factor is missing"),
    "no cache scale": (drop(f"{L0}attention.kv_cache_scaling_factor"), "kv_cache_scaling_factor is missing"),
    "no norm": (drop(f"{L0}post_layernorm.weight"), "post_layernorm.weight is missing"),
    "surplus bias": (add(f"{L0}attention.qkv.bias", 64), "qkv.bias is not expected; .* drop it with a warning"),
    "surplus head": (add("medusa_heads.2.lm_head.weight", 49, 64), "medusa_heads.2.lm_head.weight is not expected"),
    "unpadded rows": (cut("lm_head.weight"), r" lm_head.weight is float16 \[48, 64\]; expected float16 \[49, 64\]"),
    "head dtype": (cast(f"{HEAD}.weight", torch.bfloat16), f"{HEAD}.weight is bfloat16 .* expected float16"),
    "scale dtype": (cast(f"{L0}mlp.fc.weights_scaling_factor", torch.float16), "weights_scaling_factor is float16"),
    "weight dtype": (cast(f"{L0}mlp.fc.weight", torch.float16), "mlp.fc.weight is float16 .* expected float8_e4m3fn"),
}


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_tensor_fault(fault: str, written: Callable[..., Path]) -> None:
    change, message = TENSOR_FAULTS[fault]
    out = written()
    edit(out, change, rank=1)
    problems = load_problems(out)
    assert len(problems) == 1
    assert re.search(message, problems[0]), problems
    assert problems[0].startswith("rank1.safetensors: ")


# What config.json says, and the line about it. Keys with two underscores are those of a section.
CONFIG_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown quantization key": ({"quantization__quantized_layers": {}}, "quantized_layers is unknown to TensorRT-LLM"),
    "unknown mapping key": ({"mapping__rank": 0}, "mapping.rank is unknown to TensorRT-LLM, which raises"),
    "kv_dtype": ({"kv_dtype": "fp8"}, "kv_dtype at top level makes TensorRT-LLM raise"),
    "quant_mode": ({"quant_mode": 0}, "quant_mode at top level"),
    "quant_algo": ({"quant_algo": "FP8"}, ": quant_algo at top level"),
    "no hidden_act": ({"hidden_act": None}, "no hidden_act; TensorRT-LLM would take gelu"),
    "no rotary_base": ({"rotary_base": None}, "no rotary_base; TensorRT-LLM would take 10000"),
    "no max_draft_len": ({"max_draft_len": None}, "no max_draft_len; TensorRT-LLM would take 63"),
    "no num_medusa_heads": ({"num_medusa_heads": None}, "no num_medusa_heads; TensorRT-LLM would take 4"),
    "no positions": ({"position_embedding_type": None}, "would take learned_absolute"),
    "no dtype": ({"dtype": None}, "no dtype$"),
    "text for a number": ({"num_hidden_layers": "1"}, "num_hidden_layers is '1'"),
    "truth for a number": ({"max_draft_len": True}, "max_draft_len is True"),
    "architecture": ({"architecture": "LlamaForCausalLM"}, "architecture is 'LlamaForCausalLM'"),
    "scaling without a type": ({"rotary_scaling": {"rope_type": "llama3"}}, "rotary_scaling has no type"),
    "unknown scaling": ({"rotary_scaling": {"type": "su", "factor": 2.0}}, "rotary_scaling.type 'su' is not one of"),
    "scaling that is a number": ({"rotary_scaling": 2.0}, "rotary_scaling has no type"),
    "residual MLP": ({"residual_mlp": True}, "residual_mlp is set; .* ask for layers that are not there"),
    "fc after the embedding": ({"fc_after_embed": True}, "fc_after_embed is set"),
    "algo": ({"quantization__quant_algo": "FP8_ROWWISE"}, "quant_algo 'FP8_ROWWISE' is not one of"),
    "cache algo": ({"quantization__kv_cache_quant_algo": "FP4"}, "kv_cache_quant_algo 'FP4' is not one of"),
    "pipeline": ({"mapping": {"world_size": 4, "tp_size": 2, "pp_size": 2}}, "pp_size 1"),
    "context parallel": ({"mapping": {"world_size": 4, "tp_size": 2, "cp_size": 2}}, "world_size = tp_size"),
    "ranks": ({"mapping": {"world_size": 4, "tp_size": 4, "pp_size": 1}}, "rank2.safetensors: missing"),
    "rank too many": ({"mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1}}, "rank1.safetensors: belongs to no"),
    "undivided": ({"mapping": {"world_size": 3, "tp_size": 3, "pp_size": 1}}, "num_attention_heads 4 is not divisible"),
    "cache turned off": ({"quantization__kv_cache_quant_algo": None}, "kv_cache_scaling_factor is not expected"),
    "heads quantized": ({"quantization__exclude_modules": ["*lm_head"]}, f"{HEAD}.activation_scaling_factor is missing"),
    "default excludes": ({"quantization__exclude_modules": None}, f"{HEAD}.weights_scaling_factor is missing"),
    "nothing excluded": ({"quantization__exclude_modules": []}, " lm_head.activation_scaling_factor is missing"),
    "half of the MLP": ({"quantization__exclude_modules": ["*lm_head", "*medusa*", "*gate"]}, "are not both excluded"),
    "excluded too much": ({"quantization__exclude_modules": ["*"]}, "weights_scaling_factor is not expected"),
    "no pattern": ({"quantization__exclude_modules": "*lm_head"}, "expected a list of patterns"),
    "more heads": ({"num_medusa_heads": 3}, f"medusa_heads.2.lm_head.weight is missing; .*{SILENT}"),
    "fewer heads": ({"num_medusa_heads": 1}, f"{HEAD}.weight is not expected"),
    "read as Qwen": ({"model_type": "qwen2"}, "no qwen_type; TensorRT-LLM would take nothing before 1.2"),
    "embedding over ranks": ({"use_parallel_embedding": True}, r"vocab_embedding.weight is .* expected float16 \[49,"),
}  # fmt: skip


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_config_fault(fault: str, written: Callable[..., Path]) -> None:
    changes, message = CONFIG_FAULTS[fault]
    out = written()
    edit_config(out, **changes)
    problems = load_problems(out)
    assert any(re.search(message, problem) for problem in problems), problems


# The same for other formats and families: (format, family), changes of config.json, the line.
FORMAT_FAULTS: dict[str, tuple[tuple[str, str], dict[str, Any], str]] = {
    "qwen without bias": (("fp8", "qwen2"), {"attn_bias": False}, "qkv.bias is not expected"),
    "qwen sequence": (("fp8", "qwen2"), {"seq_length": None}, "no seq_length"),
    "qwen norms": (("fp8", "qwen3"), {"qwen_type": "qwen2"}, "qk_layernorm is True with qwen_type 'qwen2'"),
    "qwen 1 halves its MLP": (("fp8", "qwen2"), {"qwen_type": "qwen"}, r"mlp.fc.weight is .*40, .* expected .*\[20, "),
    "weight-only heads": (("int8_wo", "llama"), {"quantization__exclude_modules": ["*lm_head", "*vocab_embedding"]},
                          "linear.per_channel_scale is missing; exclude .*linear.: trtllm-build itself quantizes qkv"),
    "weight-only embedding": (("int4_wo", "llama"), {"quantization__exclude_modules": ["*lm_head", "*medusa_heads*"]},
                              "the embedding has to be excluded under W4A16"),
    "exact module name": (("int8_wo", "llama"), {"quantization__exclude_modules": ["*lm_head", "*vocab_embedding",
                          "*medusa_heads*", f"{L0}attention.qkv"]}, r"end the pattern with \*"),
    "whole classes": (("fp8_rowwise", "llama"), {"quantization__exclude_modules": ["*lm_head", "*mlp*"]},
                      "mlp.fc is excluded, but FP8_PER_CHANNEL_PER_TOKEN quantizes attention and MLP"),
    "group size": (("int4_awq", "llama"), {"quantization__group_size": 32}, "group_size 32 is not one of"),
    "row-wise norm": (("fp8_rowwise", "llama"), {"quantization__exclude_modules": ["*lm_head"]}, r"lacks \*ln_f: .*0.17 and 0.18"),
    "meta recipe": (("fp8_rowwise", "llama"), {"quantization__use_meta_recipe": True}, "fc.weight is float8.* expected float16"),
    "tied over ranks": (("fp8", "llama"), {"share_embedding_table": True}, "needs use_parallel_embedding"),
    "group": (("int4_awq", "llama"), {"quantization__group_size": 64}, r"weights_scaling_factor is float32 \[.*, 4\]"),
    "w4a8 group": (("w4a8_awq", "llama"), {"quantization__group_size": 64}, "group_size 64 is not one of"),
    "zero point": (("int4_awq", "llama"), {"quantization__has_zero_point": True}, "has_zero_point is True"),
    "no prequant": (("int4_awq", "llama"), {"quantization__pre_quant_scale": None}, "pre_quant_scale is None"),
    "unaligned": (("int8_wo", "llama"), {"intermediate_size": 192}, "mlp.fc under W8A16: out 192 is no multiple of 128"),
    "another algo": (("int8_sq", "llama"), {"quantization__quant_algo": "FP8"}, "mlp.fc.prequant_scaling_factor is not"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FORMAT_FAULTS)
def test_format_fault(fault: str, written: Callable[..., Path]) -> None:
    (weight_format, family), changes, message = FORMAT_FAULTS[fault]
    out = written(weight_format, family)
    edit_config(out, **changes)
    problems = load_problems(out)
    assert any(re.search(message, problem) for problem in problems), problems


def test_other_forms_that_the_loader_takes(written: Callable[..., Path]) -> None:
    def as_others_write(tensors: Tensors) -> None:
        scale = tensors.pop(f"{L0}attention.kv_cache_scaling_factor")
        tensors |= {f"{L0}attention.{x}_cache_scaling_factor": scale.clone() for x in "kv"}
        tensors[f"{L0}mlp.fc.weight"] = tensors[f"{L0}mlp.fc.weight"].view(torch.int8)

    out = written()
    edit(out, as_others_write)
    assert load_problems(out) == []
    edit(out, drop(f"{L0}attention.k_cache_scaling_factor"))
    assert [problem.split(" ")[1:4] for problem in load_problems(out)] == [
        [f"{L0}attention.kv_cache_scaling_factor", "is", "missing"],
        [f"{L0}attention.v_cache_scaling_factor", "is", "not"],
    ]


@pytest.mark.parametrize(("weight_format", "columns"), [("int8_wo", 512), ("int4_wo", 256)])
def test_weight_only_that_was_quantized_before(weight_format: str, columns: int, written: Callable[..., Path]) -> None:
    out = written(weight_format, tp=1)

    def quantize(tensors: Tensors) -> None:
        tensors[f"{L0}mlp.proj.weight"] = torch.zeros((512, columns), dtype=torch.int8)
        tensors[f"{L0}mlp.proj.per_channel_scale"] = torch.ones(512, dtype=torch.float16)

    edit(out, quantize)
    assert load_problems(out) == []
    edit(out, drop(f"{L0}mlp.proj.per_channel_scale"))
    assert [f"{L0}mlp.proj.weight is int8" in problem for problem in load_problems(out)] == [True]


def test_weight_only_heads_that_were_quantized_before(written: Callable[..., Path]) -> None:
    """As NVIDIA's converter writes them: the loader asks for them where they are not excluded."""
    out = written("int8_wo", tp=1)
    edit_config(out, quantization__exclude_modules=["*lm_head", "*vocab_embedding"])
    assert len(load_problems(out)) == 4  # of two heads, a dtype and a scale

    def quantize(tensors: Tensors) -> None:
        for head in range(2):
            name = f"medusa_heads.{head}.medusa_layers.0.linear"
            tensors[f"{name}.weight"] = torch.zeros((512, 512), dtype=torch.int8)
            tensors[f"{name}.per_channel_scale"] = torch.ones(512, dtype=torch.float16)

    edit(out, quantize)
    assert load_problems(out) == []


# What NVIDIA's converter leaves out: format, keys, what TensorRT-LLM takes.
LEFT_OUT: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": (
        "none",
        dict.fromkeys(("head_size", "attn_bias", "mlp_bias", "mapping__tp_size", "mapping__pp_size")),
        ["no head_size; TensorRT-LLM takes 16", "no attn_bias; TensorRT-LLM takes False", "no mlp_bias; TensorRT-LLM takes False",
         "no mapping.tp_size; TensorRT-LLM takes 1", "no mapping.pp_size; TensorRT-LLM takes 1"],
    ),
    "mapping": ("none", {"mapping": None}, ["no mapping; TensorRT-LLM takes {'world_size': 1, 'tp_size': 1, 'pp_size': 1}"]),
    "groups": (
        "int4_awq",
        dict.fromkeys(("quantization__group_size", "quantization__has_zero_point")),
        ["no quantization.group_size; TensorRT-LLM takes 128", "no quantization.has_zero_point; TensorRT-LLM takes False"],
    ),
    "qwen2": (
        "none",
        {"attn_bias": None},
        ["no attn_bias; TensorRT-LLM takes True", "some releases before 1.2 take attn_bias false for Qwen, and drop the bias"],
    ),
    "shared": ("none", {"share_embedding_table": True}, ["share_embedding_table is set; later releases only warn of it"]),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_OUT)
def test_keys_with_the_right_default_are_notes(case: str, written: Callable[..., Path]) -> None:
    weight_format, changes, notes = LEFT_OUT[case]
    out = written(weight_format, "qwen2" if case == "qwen2" else "llama", tp=1)
    assert load_notes(out) == []
    edit_config(out, **changes)
    assert load_problems(out) == []
    assert sorted(load_notes(out)) == sorted(f"config.json: {note}" for note in notes)


def test_rotary_buffers_are_a_note(written: Callable[..., Path]) -> None:
    out = written("none", "qwen2", tp=1)
    edit(out, add("rotary_inv_freq", 8))
    edit(out, add("embed_positions", 1, 8))
    assert load_problems(out) == []
    assert [note.split(" ")[1] for note in load_notes(out)] == ["embed_positions", "rotary_inv_freq"]


@pytest.mark.parametrize("content", ["", "[]", "{", "NaN"])
def test_config_that_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    assert len(load_problems(tmp_path)) == 1
