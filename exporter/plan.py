"""Which tensors every rank of a TensorRT-LLM Medusa checkpoint holds, and how each is made. Names and numbers only.

Source: TensorRT-LLM 0.17 .. 1.2.1, ``models/modeling_utils.py``, ``models/medusa`` and ``quantization``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial

from medusa_export.exporter.spec import ExportSpec
from medusa_export.heads import families


class Kind(Enum):
    """How a tensor's bytes come about."""

    COPY = "slices, cast to the plan's dtype"
    FP8 = "slices, divided by the weight scale of the plan's modules, in float8_e4m3fn"
    WEIGHT_SCALE = "largest weight amax of the modules / 448"
    INPUT_SCALE = "largest input amax of the modules / 448"
    KV_SCALE = "key/value amax of the layer / 448, at least 1"


@dataclass(frozen=True)
class Slice:
    """A part of a checkpoint tensor: all of it, or ``start .. stop - 1`` of rows (axis 0) or columns (axis 1)."""

    tensor: str
    axis: int | None = None
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of one rank file.

    Attributes:
        name: in the TensorRT-LLM checkpoint.
        kind: how it is made.
        dtype: torch's name.
        shape: on this rank.
        sources: stacked on axis 0; zero rows fill up what they leave of ``shape``.
        modules: the Hugging Face modules that share this tensor's scale.
        layer: whose key/value scale it is; read for that kind only.
    """

    name: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[Slice, ...] = ()
    modules: tuple[str, ...] = ()
    layer: int = 0


@dataclass(frozen=True)
class RankPlan:
    """The tensors of ``rank{rank}.safetensors``."""

    rank: int
    tensors: tuple[TensorPlan, ...]


def plan_ranks(spec: ExportSpec) -> list[RankPlan]:
    """The tensors of every rank file, in the order in which they are best read from the checkpoint."""
    return [RankPlan(rank, tuple(_rank_tensors(spec, rank))) for rank in range(spec.tp)]


def scaled_modules(spec: ExportSpec) -> list[str]:
    """Hugging Face names of the modules whose calibration the plan needs."""
    modules = (module for tensor in plan_ranks(spec)[0].tensors for module in tensor.modules)
    return list(dict.fromkeys(modules))


def scaled_layers(spec: ExportSpec) -> list[int]:
    """Layers whose key/value calibration the plan needs."""
    return list(range(spec.config.num_hidden_layers)) if spec.kv_cache.quant_algo else []


def _rank_tensors(spec: ExportSpec, rank: int) -> Iterator[TensorPlan]:
    hidden, vocab = spec.config.hidden_size, spec.config.vocab_size
    yield _copy(spec, "transformer.vocab_embedding.weight", (vocab, hidden), Slice(families.EMBED_TOKENS))
    for layer in range(spec.config.num_hidden_layers):
        yield from _layer_tensors(spec, rank, layer)
    yield _copy(spec, "transformer.ln_f.weight", (hidden,), Slice(families.FINAL_NORM))
    yield from _vocab_projection(spec, rank, "lm_head", "lm_head", fp8=False)
    for head in range(spec.num_medusa_heads):
        yield from _head_tensors(spec, rank, head)


@dataclass(frozen=True)
class _Linear:
    """A linear of one layer.

    Attributes:
        name, module: under TensorRT-LLM and in Hugging Face.
        shape: [out, in] over all ranks.
        axis: what the ranks split: 0 outputs, 1 inputs.
        fp8_with: the modules that share its FP8 scale; none is 16 bit.
    """

    name: str
    module: str
    shape: tuple[int, int]
    axis: int
    bias: bool
    fp8_with: tuple[str, ...]


# TensorRT-LLM applies the activation to ``fc`` and multiplies by ``gate``: the reverse of what the names suggest. Both
# have one scale, as in ModelOpt's export: trtllm-build fuses them and would round the weights a second time.
_GATED = (families.GATE_PROJ, families.UP_PROJ)
_LAYER_LINEARS = (
    ("attention.dense", families.O_PROJ, 1, (families.O_PROJ,)),
    ("mlp.fc", families.GATE_PROJ, 0, _GATED),
    ("mlp.gate", families.UP_PROJ, 0, _GATED),
    ("mlp.proj", families.DOWN_PROJ, 1, (families.DOWN_PROJ,)),
)


def _layer_tensors(spec: ExportSpec, rank: int, layer: int) -> Iterator[TensorPlan]:
    config, prefix, shapes = spec.config, f"transformer.layers.{layer}", spec.config.linear_shapes()
    norms = {"input_layernorm": families.INPUT_LAYERNORM, "post_layernorm": families.POST_ATTENTION_LAYERNORM}
    for name, source in norms.items():
        yield _copy(spec, f"{prefix}.{name}.weight", (config.hidden_size,), Slice(source.format(layer)))
    if config.family.qk_norm:
        for name, source in {"q_layernorm": families.Q_NORM, "k_layernorm": families.K_NORM}.items():
            yield _copy(spec, f"{prefix}.attention.{name}.weight", (config.head_dim,), Slice(source.format(layer)))
    yield from _qkv(spec, rank, layer)
    for name, pattern, axis, together in _LAYER_LINEARS:
        bias, fp8_with = config.has_bias(pattern), [each.format(layer) for each in together if spec.fp8_base]
        linear = _Linear(f"{prefix}.{name}", pattern.format(layer), shapes[pattern], axis, bias, tuple(fp8_with))
        yield from _linear(spec, rank, linear)
    if spec.kv_cache.quant_algo:
        name = f"{prefix}.attention.kv_cache_scaling_factor"
        yield TensorPlan(name, Kind.KV_SCALE, "float32", (1,), layer=layer)


def _head_tensors(spec: ExportSpec, rank: int, head: int) -> Iterator[TensorPlan]:
    hidden, prefix = spec.config.hidden_size, f"medusa_heads.{head}"
    for layer in range(spec.num_medusa_layers):
        name, module = f"{prefix}.medusa_layers.{layer}.linear", f"{prefix}.{layer}.linear"
        fp8_with = (module,) if spec.quant_heads else ()
        yield from _linear(spec, rank, _Linear(name, module, (hidden, hidden), 0, bias=True, fp8_with=fp8_with))
    # Never left out: TensorRT-LLM's check exempts names ending in lm_head.weight and would leave it random.
    module = f"{prefix}.{spec.num_medusa_layers}"
    yield from _vocab_projection(spec, rank, f"{prefix}.lm_head", module, fp8=spec.quant_heads)


def _copy(spec: ExportSpec, name: str, shape: tuple[int, ...], *sources: Slice) -> TensorPlan:
    return TensorPlan(name, Kind.COPY, spec.dtype, shape, sources)


def _qkv(spec: ExportSpec, rank: int, layer: int) -> Iterator[TensorPlan]:
    """q, k and v of one rank in one tensor: each is cut by heads first, so this is no cut of the stacked matrix."""
    config, q_heads, kv_heads = spec.config, spec.config.num_attention_heads // spec.tp, spec.local_kv_heads
    first_kv = rank * config.num_key_value_heads // spec.tp
    heads = (
        (families.Q_PROJ, rank * q_heads, q_heads),
        (families.K_PROJ, first_kv, kv_heads),
        (families.V_PROJ, first_kv, kv_heads),
    )
    parts = [(name.format(layer), first * config.head_dim, count * config.head_dim) for name, first, count in heads]
    name, rows = f"transformer.layers.{layer}.attention.qkv", sum(count for _, _, count in parts)
    for suffix, shape in (("weight", (rows, config.hidden_size)), ("bias", (rows,))):
        slices = (Slice(f"{module}.{suffix}", 0, start, start + count) for module, start, count in parts)
        plan = _copy(spec, f"{name}.{suffix}", shape, *slices)
        if suffix == "weight":
            yield from _quantized(plan, *(module for module, _, _ in parts)) if spec.fp8_base else (plan,)
        elif config.attention_bias:
            yield plan


def _linear(spec: ExportSpec, rank: int, linear: _Linear) -> Iterator[TensorPlan]:
    """A split linear. A bias is split with the outputs; where inputs are split it is added once and kept whole."""
    size = linear.shape[linear.axis] // spec.tp
    part = (linear.axis, rank * size, (rank + 1) * size)
    shape = (size, linear.shape[1]) if linear.axis == 0 else (linear.shape[0], size)
    weight = _copy(spec, f"{linear.name}.weight", shape, Slice(f"{linear.module}.weight", *part))
    yield from _quantized(weight, *linear.fp8_with) if linear.fp8_with else (weight,)
    if linear.bias:
        source = f"{linear.module}.bias"
        yield _copy(spec, f"{linear.name}.bias", shape[:1], Slice(source, *part) if linear.axis == 0 else Slice(source))


def _vocab_projection(spec: ExportSpec, rank: int, name: str, module: str, *, fp8: bool) -> Iterator[TensorPlan]:
    """Vocabulary rows split over the ranks; the last ranks end in zero rows where the vocabulary does not divide."""
    rows = spec.padded_vocab // spec.tp
    start, stop = rank * rows, min((rank + 1) * rows, spec.config.vocab_size)
    sources = (Slice(f"{module}.weight", 0, start, stop),) if start < stop else ()
    plan = _copy(spec, f"{name}.weight", (rows, spec.config.hidden_size), *sources)
    yield from _quantized(plan, module) if fp8 else (plan,)


def _quantized(weight: TensorPlan, *modules: str) -> Iterator[TensorPlan]:
    """An FP8 weight and its two scales, which are the same on every rank."""
    prefix = weight.name.removesuffix(".weight")
    yield replace(weight, kind=Kind.FP8, dtype="float8_e4m3fn", modules=modules)
    scale = partial(TensorPlan, dtype="float32", shape=(1,), modules=modules)
    yield scale(f"{prefix}.weights_scaling_factor", Kind.WEIGHT_SCALE)
    yield scale(f"{prefix}.activation_scaling_factor", Kind.INPUT_SCALE)
