"""Checks a written export against the specification, its manifest and, where given, the model that it came from.

What every file has to hold is derived here from config.json by TensorRT-LLM's rules, without the writer's plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from medusa_export.exporter.agreement import WeightError, compare_weights
from medusa_export.heads.checkpoint import TensorSource, row_chunks
from medusa_export.heads.config import read_json
from medusa_export.heads.errors import CheckpointError, ConfigError
from medusa_export.heads.manifest import verify_manifest
from medusa_export.heads.model import MedusaCheckpoint

Shapes = dict[str, tuple[str, tuple[int, ...]]]  # name: (dtype, shape)
Form = tuple[str, Callable[[int, int, int], tuple[int, ...]]]

# What TensorRT-LLM's QuantConfig knows; it raises on any other key.
QUANTIZATION_KEYS = {
    "quant_algo", "kv_cache_quant_algo", "group_size", "smoothquant_val", "clamp_val", "use_meta_recipe",
    "has_zero_point", "pre_quant_scale", "exclude_modules",
}  # fmt: skip
DEFAULT_EXCLUDES = (
    "*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding",
    "*shared_expert_gate", "*fused_a",
)  # fmt: skip
READ_ONLY_KEYS = ("kv_dtype", "quant_mode", "quant_algo")
REQUIRED_KEYS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(
        (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_size",
            "num_key_value_heads", "num_medusa_heads", "num_medusa_layers", "max_draft_len", "max_position_embeddings",
        ),
        int,
    ),
    **dict.fromkeys(("norm_epsilon", "rotary_base"), (int, float)),
    **dict.fromkeys(("attn_bias", "mlp_bias"), bool),
    **dict.fromkeys(("quantization", "mapping"), dict),
    **dict.fromkeys(("dtype", "model_type"), str),
}  # fmt: skip
QWEN_KEYS = ("qwen_type", "seq_length", "use_logn_attn")
ALLOWED_VALUES: dict[str, tuple[Any, ...]] = {
    "architecture": ("MedusaForCausalLM",),
    "dtype": ("float16", "bfloat16"),
    "logits_dtype": ("float32", "float16"),
    "hidden_act": ("silu",),
    "position_embedding_type": ("rope_gpt_neox",),
    "use_parallel_embedding": (False,),
}
# Per quant_algo, how a linear of [o, n] is stored besides in 16 bit: name -> (dtype, shape); "16 bit" is the config's dtype.
_SCALAR: Form = ("float32", lambda o, n, g: (1,))
_AWQ: dict[str, Form] = {
    "weight": ("int8", lambda o, n, g: (o // 2, n)),
    "weights_scaling_factor": ("float32", lambda o, n, g: (o, n // g)),
    "prequant_scaling_factor": ("16 bit", lambda o, n, g: (n,)),
}
STORED: dict[str, dict[str, Form]] = {
    "FP8": {
        "weight": ("float8_e4m3fn", lambda o, n, g: (o, n)),
        "weights_scaling_factor": _SCALAR,
        "activation_scaling_factor": _SCALAR,
    },
    "FP8_PER_CHANNEL_PER_TOKEN": {
        "weight": ("float8_e4m3fn", lambda o, n, g: (o, n)),
        "per_channel_scale": ("float32", lambda o, n, g: (o,)),
    },
    "W8A8_SQ_PER_CHANNEL": {
        "weight": ("int8", lambda o, n, g: (o, n)),
        "weights_scaling_factor": ("float32", lambda o, n, g: (o,)),
        "activation_scaling_factor": _SCALAR,
        "prequant_scaling_factor": ("16 bit", lambda o, n, g: (n,)),
    },
    "W4A16_AWQ": _AWQ,
    "W4A8_AWQ": {**_AWQ, "weights_scaling_factor_2": _SCALAR, "activation_scaling_factor": _SCALAR},
    "NVFP4": {
        "weight": ("uint8", lambda o, n, g: (o, n // 2)),
        "weights_scaling_factor": ("float8_e4m3fn", lambda o, n, g: (o, n // g)),
        "weights_scaling_factor_2": _SCALAR,
        "activation_scaling_factor": _SCALAR,
    },
}
GROUPED = {"W4A16_AWQ": (64, 128), "W4A8_AWQ": (128,), "NVFP4": (16,)}  # group sizes with a kernel
BUILT = ("W8A16", "W4A16")  # 16 bit in the file; trtllm-build quantizes
WEIGHT_ALGOS = (None, *BUILT, *STORED)
KV_ALGOS = (None, "FP8", "INT8")
POSITIVE = ("_scaling_factor", "_scaling_factor_2", "per_channel_scale")


def verify_export(out: Path) -> list[str]:
    """Problems of an export directory: its manifest's hashes, then the checkpoint in ``out/trtllm`` if there is one."""
    problems = list(verify_manifest(out))
    return problems + (verify_trtllm(out / "trtllm") if (out / "trtllm").is_dir() else [])


def verify_trtllm(
    trt_dir: Path, checkpoint: MedusaCheckpoint | None = None, errors: dict[str, WeightError] | None = None
) -> list[str]:
    """Problems of a TensorRT-LLM Medusa checkpoint, one line each; an empty list is a good checkpoint.

    Args:
        trt_dir: the directory with config.json and the rank files.
        checkpoint: the model and heads that it was made from; every weight is compared with theirs.
        errors: filled with what quantization did to every tensor, when there is a checkpoint to compare with.
    """
    try:
        config = read_json(trt_dir / "config.json")
        problems = _config_problems(config) or _file_problems(trt_dir, config, values=checkpoint is None)
        if not problems and checkpoint is not None:
            problems = compare_weights(trt_dir, checkpoint, errors)
    except (CheckpointError, ConfigError) as error:
        return [str(error)]
    return problems


def required_tensors(config: dict[str, Any]) -> Shapes:
    """Dtype and shape of every tensor that each rank file has to hold, by name."""
    dtype, hidden = config["dtype"], config["hidden_size"]
    stored, group = STORED.get(config["quantization"]["quant_algo"]), config["quantization"].get("group_size", 128)
    need: Shapes = {
        "transformer.vocab_embedding.weight": (dtype, (config["vocab_size"], hidden)),
        "transformer.ln_f.weight": (dtype, (hidden,)),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"transformer.layers.{layer}."
        need |= {f"{prefix}{norm}.weight": (dtype, (hidden,)) for norm in ("input_layernorm", "post_layernorm")}
        if config.get("qk_layernorm"):
            need |= {f"{prefix}attention.{x}_layernorm.weight": (dtype, (config["head_size"],)) for x in "qk"}
        if config["quantization"].get("kv_cache_quant_algo"):
            need[f"{prefix}attention.kv_cache_scaling_factor"] = ("float32", (1,))
    for module, shape, bias_size in _linears(config):
        if bias_size:
            need[f"{module}.bias"] = (dtype, (bias_size,))
        if stored is None or _excluded(config, module):
            need[f"{module}.weight"] = (dtype, shape)
            continue
        for suffix, (form, size) in stored.items():
            need[f"{module}.{suffix}"] = (dtype if form == "16 bit" else form, size(*shape, group))
    return need


def _linears(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, int], int]]:
    """Every linear: its name, local [out, in] and the length of its bias (0 is none)."""
    tp, hidden, inner = config["mapping"]["tp_size"], config["hidden_size"], config["intermediate_size"]
    size, q_heads, kv_heads = config["head_size"], config["num_attention_heads"], config["num_key_value_heads"]
    vocab = -(-config["vocab_size"] // tp)
    qkv = (q_heads // tp + 2 * -(-kv_heads // tp)) * size
    attn_bias, mlp_bias = config["attn_bias"], config["mlp_bias"]
    dense_bias = attn_bias and "qwen" not in config["model_type"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"transformer.layers.{layer}."
        yield f"{prefix}attention.qkv", (qkv, hidden), attn_bias * qkv
        yield f"{prefix}attention.dense", (hidden, q_heads * size // tp), dense_bias * hidden
        yield f"{prefix}mlp.fc", (inner // tp, hidden), mlp_bias * (inner // tp)
        yield f"{prefix}mlp.gate", (inner // tp, hidden), mlp_bias * (inner // tp)
        yield f"{prefix}mlp.proj", (hidden, inner // tp), mlp_bias * hidden
    yield "lm_head", (vocab, hidden), 0
    for head in range(config["num_medusa_heads"]):
        for layer in range(config["num_medusa_layers"]):
            yield f"medusa_heads.{head}.medusa_layers.{layer}.linear", (hidden // tp, hidden), hidden // tp
        yield f"medusa_heads.{head}.lm_head", (vocab, hidden), 0


def _excluded(config: dict[str, Any], module: str) -> bool:
    patterns = config["quantization"].get("exclude_modules")
    return any(fnmatchcase(module, pattern) for pattern in (DEFAULT_EXCLUDES if patterns is None else patterns))


def _config_problems(config: dict[str, Any]) -> list[str]:
    keys = (*REQUIRED_KEYS, *(QWEN_KEYS if "qwen" in str(config.get("model_type")) else ()))
    broken = [f"config.json: no {key}" for key in keys if key not in config]
    broken += [
        f"config.json: {key} is {config[key]!r}"
        for key, kind in REQUIRED_KEYS.items()
        if key in config and not isinstance(config[key], kind)
    ]
    if broken:
        return broken
    problems = [
        f"config.json: {key} is {config.get(key)!r}; expected one of {values}"
        for key, values in ALLOWED_VALUES.items()
        if config.get(key) not in values
    ]
    problems += [f"config.json: {key} at top level makes TensorRT-LLM raise" for key in READ_ONLY_KEYS if key in config]
    return problems + _quantization_problems(config) + _number_problems(config)


def _quantization_problems(config: dict[str, Any]) -> list[str]:
    quantization = config["quantization"]
    unknown = sorted(quantization.keys() - QUANTIZATION_KEYS)
    problems = [f"config.json: quantization.{key} is unknown to TensorRT-LLM, which raises" for key in unknown]
    for key, known in (("quant_algo", WEIGHT_ALGOS), ("kv_cache_quant_algo", KV_ALGOS)):
        if quantization.get(key) not in known:
            problems.append(f"config.json: quantization.{key} {quantization.get(key)!r} is not one of {known}")
    algo = quantization.get("quant_algo")
    if algo in BUILT:
        built = (".qkv", ".dense", ".fc", ".gate", ".proj")  # all that trtllm-build quantizes by itself
        stray = [name for name, _, _ in _linears(config) if not name.endswith(built) and not _excluded(config, name)]
        problems += [f"config.json: {name} has to be excluded under {algo}" for name in stray]
        if not _excluded(config, "transformer.vocab_embedding"):
            problems.append(f"config.json: the embedding has to be excluded under {algo}")
    if algo in GROUPED and quantization.get("group_size") not in GROUPED[algo]:
        got = quantization.get("group_size")
        problems.append(f"config.json: quantization.group_size {got!r} is not one of {GROUPED[algo]} under {algo}")
    if algo in ("W4A16_AWQ", "W4A8_AWQ"):
        wrong = [
            key
            for key, want in (("has_zero_point", False), ("pre_quant_scale", True))
            if quantization.get(key) is not want
        ]
        problems += [f"config.json: quantization.{key} is {quantization.get(key)!r} under {algo}" for key in wrong]
    return problems


def _number_problems(config: dict[str, Any]) -> list[str]:
    mapping, scaling = config["mapping"], config.get("rotary_scaling")
    tp, kv_heads = mapping.get("tp_size", 0), config["num_key_value_heads"]
    if tp < 1 or mapping.get("world_size") != tp or mapping.get("pp_size", 1) != 1:
        return [f"config.json: mapping {mapping}; expected world_size = tp_size and pp_size 1"]
    checks = {
        "max_draft_len is below 1": config["max_draft_len"] < 1,
        "num_medusa_heads is below 1": config["num_medusa_heads"] < 1,
        "num_medusa_layers is below 1": config["num_medusa_layers"] < 1,
        f"num_attention_heads does not divide by tp {tp}": config["num_attention_heads"] % tp,
        f"num_key_value_heads and tp {tp} do not divide": max(kv_heads, tp) % min(kv_heads, tp),
        f"hidden_size does not divide by tp {tp}": config["hidden_size"] % tp,
        f"intermediate_size does not divide by tp {tp}": config["intermediate_size"] % tp,
        "rotary_scaling has no type": scaling is not None and "type" not in scaling,
    }
    return [f"config.json: {what}" for what, wrong in checks.items() if wrong]


def _file_problems(trt_dir: Path, config: dict[str, Any], *, values: bool) -> list[str]:
    """Ranks and what is in them.

    Args:
        values: look at the values of matrices too; a comparison with the source does it better.
    """
    expected = {f"rank{rank}.safetensors" for rank in range(config["mapping"]["tp_size"])}
    present = {path.name for path in trt_dir.glob("*.safetensors")}
    problems = [f"{name}: missing" for name in sorted(expected - present)]
    problems += [f"{name}: belongs to no rank" for name in sorted(present - expected)]
    need = required_tensors(config)
    for name in sorted(expected & present):
        problems += [
            f"{name}: {problem}" for problem in _rank_problems(TensorSource.open(trt_dir / name), need, values)
        ]
    return problems


def _rank_problems(source: TensorSource, need: Shapes, values: bool) -> Iterator[str]:
    yield from (f"{name} is missing" for name in need.keys() - source.names)
    yield from (f"{name} is not expected" for name in set(source.names) - need.keys())
    for name, (dtype, shape) in need.items():
        if name not in source:
            continue
        if (source.dtype(name), source.shape(name)) != (dtype, shape):
            yield f"{name} is {source.dtype(name)} {list(source.shape(name))}; expected {dtype} {list(shape)}"
            continue
        is_scale = name.endswith(POSITIVE)
        if not values and not is_scale and len(shape) > 1:
            continue
        tensor = source.read(name)
        if tensor.is_floating_point() and not all(_finite(part) for part in row_chunks(tensor)):
            yield f"{name} has values that are not finite"
        elif is_scale and not bool((tensor.to(torch.float32) > 0).all()):
            yield f"{name} has the value {float(tensor.to(torch.float32).min())}; a scale is above 0"


def _finite(part: torch.Tensor) -> bool:
    """Whether all values are; the smallest and largest tell, and NaN comes through both."""
    if part.dtype == torch.float8_e4m3fn:
        return int((part.view(torch.uint8) & 0x7F).max()) < 0x7F  # its only NaN, and it has no infinity
    low, high = part.aminmax()
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))
