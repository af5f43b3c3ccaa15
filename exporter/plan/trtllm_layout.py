"""Which tensors every rank of a TensorRT-LLM Medusa checkpoint holds, and how each is made. Names and numbers only.

Source: TensorRT-LLM 0.17 .. 1.2.1, ``models/modeling_utils.py``, ``models/medusa`` and ``quantization``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.plan.module_names import trtllm_layer, trtllm_linear
from medusa_export.exporter.plan.spec import ExportSpec
from medusa_export.exporter.plan.tensor_plan import Slice, TensorPlan
from medusa_export.heads.checkpoint import families
from medusa_export.quantize.scales import Scales
from medusa_export.quantize.stored_parts import Kind


@dataclass(frozen=True)
class RankPlan:
    """The tensors of ``rank{rank}.safetensors``."""

    rank: int
    tensors: tuple[TensorPlan, ...]


def plan_ranks(spec: ExportSpec) -> list[RankPlan]:
    """The tensors of every rank file, in the order in which they are best read from the checkpoint."""
    return [plan_rank(spec, rank) for rank in range(spec.tp)]


def plan_rank(spec: ExportSpec, rank: int) -> RankPlan:
    """The tensors of one rank file."""
    return RankPlan(rank, tuple(_rank_tensors(spec, rank)))


_CALIBRATED = {Kind.INPUT_SCALE: "input_amax", Kind.WEIGHT_SCALE: "weight_amax", Kind.SMOOTHING: "pre_quant_scale"}


def needed_scales(spec: ExportSpec) -> dict[str, list[str | int]]:
    """What a calibration has to have measured: kind of scale -> modules, or layers for "kv_amax"."""
    needed: dict[str, dict[str | int, None]] = {}
    for tensor in plan_rank(spec, 0).tensors:
        if tensor.kind is Kind.KV_SCALE:
            needed.setdefault("kv_amax", {})[tensor.layer] = None
        elif tensor.kind in _CALIBRATED:
            needed.setdefault(_CALIBRATED[tensor.kind], {}).update(dict.fromkeys(tensor.modules))
    return {kind: list(names) for kind, names in needed.items()}


def _rank_tensors(spec: ExportSpec, rank: int) -> Iterator[TensorPlan]:
    hidden, vocab = spec.config.hidden_size, spec.config.vocab_size
    yield _copy(spec, "transformer.vocab_embedding.weight", (vocab, hidden), Slice(families.EMBED_TOKENS))
    for layer in range(spec.config.num_hidden_layers):
        yield from _layer_tensors(spec, rank, layer)
    yield _copy(spec, "transformer.ln_f.weight", (hidden,), Slice(families.FINAL_NORM))
    yield from _vocab_projection(spec, rank, "lm_head", "lm_head", quantized=False)
    for head in range(spec.num_medusa_heads):
        yield from _head_tensors(spec, rank, head)


@dataclass(frozen=True)
class _Linear:
    """A linear of one layer.

    Attributes:
        name, module: under TensorRT-LLM and in Hugging Face.
        shape: [out, in] over all ranks.
        axis: what the ranks split: 0 outputs, 1 inputs.
        scaled_with: the modules that share its scales; none is 16 bit.
    """

    name: str
    module: str
    shape: tuple[int, int]
    axis: int
    bias: bool
    scaled_with: tuple[str, ...]


# Gate and up have one FP8 or NVFP4 scale, as in ModelOpt's export: trtllm-build fuses them and would round the weights a second time.
_GATED = (families.GATE_PROJ, families.UP_PROJ)
_LAYER_LINEARS = (  # pattern, axis that ranks split, linears that share its scales
    (families.O_PROJ, 1, (families.O_PROJ,)),
    (families.GATE_PROJ, 0, _GATED),
    (families.UP_PROJ, 0, _GATED),
    (families.DOWN_PROJ, 1, (families.DOWN_PROJ,)),
)


def _layer_tensors(spec: ExportSpec, rank: int, layer: int) -> Iterator[TensorPlan]:
    config, prefix, shapes = spec.config, trtllm_layer(layer), spec.config.linear_shapes()
    norms = {"input_layernorm": families.INPUT_LAYERNORM, "post_layernorm": families.POST_ATTENTION_LAYERNORM}
    for name, source in norms.items():
        yield _copy(spec, f"{prefix}.{name}.weight", (config.hidden_size,), Slice(source.format(layer)))
    if config.family.qk_norm:
        for name, source in {"q_layernorm": families.Q_NORM, "k_layernorm": families.K_NORM}.items():
            yield _copy(spec, f"{prefix}.attention.{name}.weight", (config.head_dim,), Slice(source.format(layer)))
    yield from _qkv(spec, rank, layer)
    for pattern, axis, together in _LAYER_LINEARS:
        name, bias = trtllm_linear(pattern, layer), config.has_bias(pattern)
        shared = (pattern,) if spec.weight_format.smooths else together  # smoothed linears are not fused
        scaled_with = tuple(each.format(layer) for each in shared) if spec.is_quantized(name) else ()
        linear = _Linear(name, pattern.format(layer), shapes[pattern], axis, bias, scaled_with)
        yield from _linear(spec, rank, linear)
    if spec.kv_cache.quant_algo:
        name = f"{prefix}.attention.kv_cache_scaling_factor"
        yield TensorPlan(name, Kind.KV_SCALE, "float32", (1,), layer=layer)


def _head_tensors(spec: ExportSpec, rank: int, head: int) -> Iterator[TensorPlan]:
    hidden, prefix = spec.config.hidden_size, f"medusa_heads.{head}"
    for layer in range(spec.num_medusa_layers):
        name, module = f"{prefix}.medusa_layers.{layer}.linear", f"{prefix}.{layer}.linear"
        scaled_with = (module,) if spec.is_quantized(name) else ()
        yield from _linear(spec, rank, _Linear(name, module, (hidden, hidden), 0, True, scaled_with))
    # Never left out: TensorRT-LLM's check exempts names ending in lm_head.weight and would leave it random.
    name, module = f"{prefix}.lm_head", f"{prefix}.{spec.num_medusa_layers}"
    yield from _vocab_projection(spec, rank, name, module, quantized=spec.is_quantized(name))


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
    name, rows = trtllm_linear(families.Q_PROJ, layer), sum(count for _, _, count in parts)
    for suffix, shape in (("weight", (rows, config.hidden_size)), ("bias", (rows,))):
        slices = (Slice(f"{module}.{suffix}", start, start + count) for module, start, count in parts)
        plan = _copy(spec, f"{name}.{suffix}", shape, *slices)
        if suffix == "weight":
            yield from _stored(spec, plan, tuple(module for module, _, _ in parts) if spec.is_quantized(name) else ())
        elif config.attention_bias:
            yield plan


def _linear(spec: ExportSpec, rank: int, linear: _Linear) -> Iterator[TensorPlan]:
    """A split linear. A bias is split with the outputs; where inputs are split it is added once and kept whole."""
    size = linear.shape[linear.axis] // spec.tp
    part = (rank * size, (rank + 1) * size)
    shape = (size, linear.shape[1]) if linear.axis == 0 else (linear.shape[0], size)
    source = Slice(f"{linear.module}.weight", *part) if linear.axis == 0 else Slice(f"{linear.module}.weight")
    weight = _copy(spec, f"{linear.name}.weight", shape, source)
    yield from _stored(spec, weight if linear.axis == 0 else replace(weight, columns=part), linear.scaled_with)
    if linear.bias:
        bias = f"{linear.module}.bias"
        yield _copy(spec, f"{linear.name}.bias", shape[:1], Slice(bias, *part) if linear.axis == 0 else Slice(bias))


def _vocab_projection(spec: ExportSpec, rank: int, name: str, module: str, *, quantized: bool) -> Iterator[TensorPlan]:
    """Vocabulary rows split over the ranks; the last ranks end in zero rows where the vocabulary does not divide."""
    rows = spec.padded_vocab // spec.tp
    start, stop = rank * rows, min((rank + 1) * rows, spec.config.vocab_size)
    sources = (Slice(f"{module}.weight", start, stop),) if start < stop else ()
    plan = _copy(spec, f"{name}.weight", (rows, spec.config.hidden_size), *sources)
    yield from _stored(spec, plan, (module,) if quantized else ())


def _stored(spec: ExportSpec, weight: TensorPlan, modules: tuple[str, ...]) -> Iterator[TensorPlan]:
    """The tensors of a linear: its weight as it is, or what the format keeps of it, scales included."""
    if not modules:
        yield weight
        return
    prefix, (out, width) = weight.name.removesuffix("weight"), weight.shape
    for part in spec.weight_format.trtllm.parts:
        shape = part.shape(out, width, spec.weight_format.group_size or 1)
        dtype = part.dtype or spec.dtype
        yield replace(weight, name=prefix + part.suffix, kind=part.kind, dtype=dtype, shape=shape, modules=modules)


def require_scales(spec: ExportSpec, scales: Scales | None) -> Scales:
    """The scales, once everything that the layout quantizes has one; raises what :func:`write_trtllm` would."""
    needed = needed_scales(spec)
    if scales is None and needed:
        got = f"no scales for format {spec.weight_format.name} with kv cache {spec.kv_cache.name}"
        raise ConfigError("scales", got, "the result of a calibration", "calibrate first")
    scales = scales or Scales()
    scales.require(needed)
    return scales
