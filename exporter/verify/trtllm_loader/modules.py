"""The tensors that TensorRT-LLM's Medusa model asks every rank file for, derived from config.json alone, without the writer.

Modules are laid out as TensorRT-LLM's Llama and Qwen models declare them, then swapped for quantized ones as its ``quantize_layers``
does. Sources: tensorrt_llm/models/{medusa,llama,qwen}/model.py, models/modeling_utils.py, quantization/{quantize,layers,mode}.py and
layers/{attention,mlp,linear,embedding}.py of the releases 0.17 to 1.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

DEFAULT_EXCLUDES = (
    "*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding", "*shared_expert_gate",
    "*fused_a",
)  # fmt: skip
# FP8_PER_CHANNEL_PER_TOKEN's own; in TensorRT-LLM 0.17 and 0.18 a list in config.json replaces it, and the norm is quantized.
ROWWISE_EXCLUDES = ("*ln_f", "*ln_embed")
FINAL_NORM = "transformer.ln_f"
# Buffers that the model makes itself; it takes them from a file too, as NVIDIA's converter writes them for Qwen2.
BUFFERS = ("embed_positions", "embed_positions_for_gpt_attention", "rotary_inv_freq")
DEFAULT_GROUP_SIZE = 128
BUILDER_QUANTIZES = (
    "qkv",
    "dense",
    "fc",
    "proj",
    "gate",
)  # the linears that trtllm-build itself turns into INT8 or INT4


@dataclass(frozen=True)
class Module:
    """One module with a weight, as it stands on one rank before it is quantized.

    Attributes:
        name: without a suffix, such as ``transformer.layers.0.mlp.fc``.
        kind: "column" or "row" (how tensor parallelism splits a linear), "norm" or "embedding".
        shape: of its weight on a rank; of a linear [out, in].
        bias: whether it has one; a row linear's is not split.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bias: bool = False

    @property
    def is_linear(self) -> bool:
        """Whether quantization may replace it."""
        return self.kind in ("column", "row")


Needs = dict[str, tuple[str, tuple[int, ...]]]  # name: (dtype, shape)
Rule = tuple[
    str, str, Callable[[int, int, int], tuple[int, ...]]
]  # suffix, dtype ("model": config's), shape of (o, n, g)

_ONE: Callable[[int, int, int], tuple[int, ...]] = lambda o, n, g: (1,)  # noqa: E731
_FULL: Callable[[int, int, int], tuple[int, ...]] = lambda o, n, g: (o, n)  # noqa: E731
_GROUPWISE: tuple[Rule, ...] = (
    ("weight", "int8", lambda o, n, g: (o // 2, n)),
    ("weights_scaling_factor", "float32", lambda o, n, g: (o, n // g)),
    ("prequant_scaling_factor", "model", lambda o, n, g: (n,)),
)


@dataclass(frozen=True)
class Algo:
    """What one ``quant_algo`` does to a linear.

    Attributes:
        rules: the tensors that a quantized linear has in the file besides its bias.
        multiple: what out and in must be multiples of, see :func:`padding`.
        per_rank: whether ``multiple`` is of the rank's part; else of the whole linear, and times tp.
        listed: whether ``exclude_modules`` is read; else attention and MLP are replaced as whole classes, and nothing else is.
        group_sizes: those that have a kernel; empty where there are no groups.
        by_builder: whether trtllm-build itself quantizes the linears of ``BUILDER_QUANTIZES``.
    """

    rules: tuple[Rule, ...]
    multiple: tuple[int, int] = (1, 1)
    per_rank: bool = False
    listed: bool = True
    group_sizes: tuple[int, ...] = ()
    by_builder: bool = False


_FP8: tuple[Rule, ...] = (
    ("weight", "float8_e4m3fn", _FULL),
    ("weights_scaling_factor", "float32", _ONE),
    ("activation_scaling_factor", "float32", _ONE),
)
ALGOS: dict[str, Algo] = {
    "FP8": Algo(_FP8),
    "FP8_PER_CHANNEL_PER_TOKEN": Algo(
        (("weight", "float8_e4m3fn", _FULL), ("per_channel_scale", "float32", lambda o, n, g: (o,))), listed=False
    ),
    "W8A16": Algo(
        (("weight", "int8", lambda o, n, g: (n, o)), ("per_channel_scale", "model", lambda o, n, g: (o,))),
        (64, 64),
        by_builder=True,
    ),
    "W4A16": Algo(
        (("weight", "int8", lambda o, n, g: (n, o // 2)), ("per_channel_scale", "model", lambda o, n, g: (o,))),
        (64, 64),
        by_builder=True,
    ),
    "W8A8_SQ_PER_CHANNEL": Algo(
        (
            ("weight", "int8", _FULL),
            ("weights_scaling_factor", "float32", lambda o, n, g: (o,)),
            ("activation_scaling_factor", "float32", _ONE),
            ("prequant_scaling_factor", "model", lambda o, n, g: (n,)),
        )
    ),
    "W4A16_AWQ": Algo(_GROUPWISE, (64, 64), group_sizes=(64, 128)),
    "W4A8_AWQ": Algo(
        (*_GROUPWISE, ("weights_scaling_factor_2", "float32", _ONE), ("activation_scaling_factor", "float32", _ONE)),
        (128, 128),
        group_sizes=(128,),
    ),
    "NVFP4": Algo(
        (
            ("weight", "uint8", lambda o, n, g: (o, n // 2)),
            ("weights_scaling_factor", "float8_e4m3fn", lambda o, n, g: (o, n // 16)),
            ("weights_scaling_factor_2", "float32", _ONE),
            ("activation_scaling_factor", "float32", _ONE),
        ),
        (128, 64),
        per_rank=True,
    ),
}
KV_ALGOS = ("FP8", "INT8")
MLP_DIVISORS = {"qwen": 2}  # by qwen_type: Qwen 1 counts gate and up in intermediate_size


def is_qwen(config: Mapping[str, Any]) -> bool:
    """The base class that MedusaForCausalLm picks: QWenForCausalLM, or LLaMAForCausalLM for everything else."""
    return "qwen" in str(config.get("model_type"))


def medusa_modules(config: Mapping[str, Any]) -> Iterator[Module]:
    """Every module of the model on one rank; tensor-parallel ranks differ in values only."""
    hidden, vocab, tp = config["hidden_size"], config["vocab_size"], config["mapping"]["tp_size"]
    padded = -(-vocab // tp)  # rows of a vocabulary projection on a rank
    if not config.get("use_parallel_embedding", False):
        embedding = (vocab, hidden)
    else:
        embedding = (padded, hidden) if config.get("embedding_sharding_dim", 0) == 0 else (vocab, hidden // tp)
    yield Module("transformer.vocab_embedding", "embedding", embedding)
    for layer in range(config["num_hidden_layers"]):
        yield from _layer(config, f"transformer.layers.{layer}")
    yield Module("transformer.ln_f", "norm", (hidden,))
    yield Module("lm_head", "column", (padded, hidden))
    for head in range(config["num_medusa_heads"]):
        for block in range(config["num_medusa_layers"]):
            yield Module(f"medusa_heads.{head}.medusa_layers.{block}.linear", "column", (hidden // tp, hidden), True)
        yield Module(f"medusa_heads.{head}.lm_head", "column", (padded, hidden))


def _layer(config: Mapping[str, Any], name: str) -> Iterator[Module]:
    hidden, tp, qwen = config["hidden_size"], config["mapping"]["tp_size"], is_qwen(config)
    heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_size"]
    inner = config["intermediate_size"] // (MLP_DIVISORS.get(str(config.get("qwen_type")), 1) if qwen else 1)
    bias, mlp_bias = config.get("attn_bias", False), config.get("mlp_bias", False)
    yield Module(f"{name}.input_layernorm", "norm", (hidden,))
    rows = (heads // tp + 2 * -(-kv_heads // tp)) * size  # kv heads fewer than ranks are repeated
    yield Module(f"{name}.attention.qkv", "column", (rows, hidden), bias)
    yield Module(f"{name}.attention.dense", "row", (hidden, heads // tp * size), bias and not qwen)
    if _has_qk_norms(config):
        yield Module(f"{name}.attention.q_layernorm", "norm", (size,))
        yield Module(f"{name}.attention.k_layernorm", "norm", (size,))
    yield Module(f"{name}.post_layernorm", "norm", (hidden,))
    yield Module(f"{name}.mlp.fc", "column", (inner // tp, hidden), mlp_bias)
    yield Module(f"{name}.mlp.gate", "column", (inner // tp, hidden), mlp_bias)
    yield Module(f"{name}.mlp.proj", "row", (hidden, inner // tp), mlp_bias)


def _has_qk_norms(config: Mapping[str, Any]) -> bool:
    if is_qwen(config):
        return str(config.get("qwen_type", "")).startswith("qwen3")
    return bool(config.get("qk_layernorm", False))


def excluded(patterns: tuple[str, ...], name: str) -> bool:
    """Whether a name matches a pattern of ``exclude_modules``."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def exclude_patterns(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What ``exclude_modules`` comes to; a list in config.json takes the place of the default one."""
    given, algo = config["quantization"].get("exclude_modules"), config["quantization"].get("quant_algo")
    default = DEFAULT_EXCLUDES if algo is None or ALGOS[algo].listed else ROWWISE_EXCLUDES
    return default if given is None else tuple(given)


def is_quantized(config: Mapping[str, Any], module: Module) -> bool:
    """Whether ``quantize_layers`` replaces a module."""
    algo = config["quantization"].get("quant_algo")
    if algo is None or not module.is_linear:
        return False
    if not ALGOS[algo].listed:
        if config["quantization"].get("use_meta_recipe"):
            ends = (f"transformer.layers.{layer}." for layer in (0, config["num_hidden_layers"] - 1))
            return ".mlp." in module.name and not module.name.startswith(tuple(ends))
        return ".attention." in module.name or ".mlp." in module.name
    return not excluded(exclude_patterns(config), module.name)


def padding(config: Mapping[str, Any], module: Module) -> str:
    """What keeps a quantized linear from having the shape that the file has: it pads itself, without a word. Empty: nothing."""
    quantization, tp = config["quantization"], config["mapping"]["tp_size"]
    algo = ALGOS[quantization["quant_algo"]]
    group = quantization.get("group_size") if algo.group_sizes else None
    wanted = [max(multiple, group or 1) * (1 if algo.per_rank else tp) for multiple in algo.multiple]
    whole = [module.shape[0], module.shape[1]]
    if not algo.per_rank:
        whole[0 if module.kind == "column" else 1] *= tp
    odd = [
        f"{way} {size} is no multiple of {multiple}"
        for way, size, multiple in zip(("out", "in"), whole, wanted, strict=True)
        if size % multiple
    ]
    return " and ".join(odd)


def module_needs(config: Mapping[str, Any], module: Module, *, processed: bool = False) -> Needs:
    """The tensors of one module.

    Args:
        processed: under W8A16 and W4A16, the form that trtllm-build leaves as it is, for the linears that it would quantize.
    """
    dtype, algo = config["dtype"], config["quantization"].get("quant_algo")
    needs = {f"{module.name}.bias": (dtype, module.shape[:1])} if module.bias else {}
    by_builder = algo is not None and ALGOS[algo].by_builder and module.name.rsplit(".", 1)[-1] in BUILDER_QUANTIZES
    if not is_quantized(config, module) or (by_builder and not processed):
        return {f"{module.name}.weight": (dtype, module.shape), **needs}
    out, width = module.shape
    group = config["quantization"].get("group_size") or DEFAULT_GROUP_SIZE
    for suffix, stored, shape in ALGOS[algo].rules:
        needs[f"{module.name}.{suffix}"] = (dtype if stored == "model" else stored, shape(out, width, group))
    return needs


def required_tensors(config: Mapping[str, Any]) -> Needs:
    """Every tensor that a rank file must hold; what :func:`module_needs` says of each module, and the cache's scales."""
    needs: Needs = {}
    for module in medusa_modules(config):
        needs |= module_needs(config, module)
    if config["quantization"].get("kv_cache_quant_algo") is not None:
        for layer in range(config["num_hidden_layers"]):
            needs[f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"] = ("float32", (1,))
    return needs
