"""Checks a written export against the specification, its manifest and, where given, the model that it came from.

What every file has to hold is derived here from config.json by TensorRT-LLM's rules, without the writer's plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from medusa_export.exporter.agreement import compare_weights
from medusa_export.heads.checkpoint import TensorSource, row_chunks
from medusa_export.heads.config import read_json
from medusa_export.heads.errors import CheckpointError, ConfigError
from medusa_export.heads.manifest import verify_manifest
from medusa_export.heads.model import MedusaCheckpoint

Shapes = dict[str, tuple[str, tuple[int, ...]]]  # name: (dtype, shape)

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
WEIGHT_ALGOS = (None, "FP8", "W8A16")
KV_ALGOS = (None, "FP8")


def verify_export(out: Path) -> list[str]:
    """Problems of an export directory: its manifest's hashes, then the checkpoint in ``out/trtllm`` if there is one."""
    problems = list(verify_manifest(out))
    return problems + (verify_trtllm(out / "trtllm") if (out / "trtllm").is_dir() else [])


def verify_trtllm(trt_dir: Path, checkpoint: MedusaCheckpoint | None = None) -> list[str]:
    """Problems of a TensorRT-LLM Medusa checkpoint, one line each; an empty list is a good checkpoint.

    Args:
        trt_dir: the directory with config.json and the rank files.
        checkpoint: the model and heads that it was made from; every weight is compared with theirs.
    """
    try:
        config = read_json(trt_dir / "config.json")
        problems = _config_problems(config) or _file_problems(trt_dir, config)
        if not problems and checkpoint is not None:
            problems = compare_weights(trt_dir, checkpoint)
    except (CheckpointError, ConfigError) as error:
        return [str(error)]
    return problems


def required_tensors(config: dict[str, Any]) -> Shapes:
    """Dtype and shape of every tensor that each rank file has to hold, by name."""
    dtype, hidden = config["dtype"], config["hidden_size"]
    fp8 = config["quantization"]["quant_algo"] == "FP8"
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
        quantized = fp8 and not _excluded(config, module)
        need[f"{module}.weight"] = ("float8_e4m3fn" if quantized else dtype, shape)
        if bias_size:
            need[f"{module}.bias"] = (dtype, (bias_size,))
        if quantized:
            need |= {f"{module}.{kind}_scaling_factor": ("float32", (1,)) for kind in ("weights", "activation")}
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
    if quantization.get("quant_algo") == "W8A16":
        built = (".qkv", ".dense", ".fc", ".gate", ".proj")  # all that trtllm-build quantizes by itself
        stray = [name for name, _, _ in _linears(config) if not name.endswith(built) and not _excluded(config, name)]
        problems += [f"config.json: {name} has to be excluded under W8A16" for name in stray]
        if not _excluded(config, "transformer.vocab_embedding"):
            problems.append("config.json: the embedding has to be excluded under W8A16")
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


def _file_problems(trt_dir: Path, config: dict[str, Any]) -> list[str]:
    expected = {f"rank{rank}.safetensors" for rank in range(config["mapping"]["tp_size"])}
    present = {path.name for path in trt_dir.glob("*.safetensors")}
    problems = [f"{name}: missing" for name in sorted(expected - present)]
    problems += [f"{name}: belongs to no rank" for name in sorted(present - expected)]
    need = required_tensors(config)
    for name in sorted(expected & present):
        problems += [f"{name}: {problem}" for problem in _rank_problems(TensorSource.open(trt_dir / name), need)]
    return problems


def _rank_problems(source: TensorSource, need: Shapes) -> Iterator[str]:
    yield from (f"{name} is missing" for name in need.keys() - source.names)
    yield from (f"{name} is not expected" for name in set(source.names) - need.keys())
    for name, (dtype, shape) in need.items():
        if name not in source:
            continue
        if (source.dtype(name), source.shape(name)) != (dtype, shape):
            yield f"{name} is {source.dtype(name)} {list(source.shape(name))}; expected {dtype} {list(shape)}"
            continue
        tensor = source.read(name)
        if not all(torch.isfinite(part.to(torch.float32)).all() for part in row_chunks(tensor)):
            yield f"{name} has values that are not finite"
        elif name.endswith("scaling_factor") and not (tensor > 0).all():
            yield f"{name} is {tensor.item()}; a scale is above 0"
