"""Writes a TensorRT-LLM Medusa checkpoint: config.json and one safetensors file a rank, a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from medusa_export.exporter.plan import Kind, Slice, TensorPlan, plan_ranks, scaled_layers, scaled_modules
from medusa_export.exporter.safetensors_writer import SafetensorsWriter
from medusa_export.exporter.spec import ExportSpec
from medusa_export.exporter.trtllm_config import trtllm_config
from medusa_export.heads.checkpoint import row_chunks
from medusa_export.heads.errors import CheckpointError, ConfigError, OutputError
from medusa_export.heads.model import MedusaCheckpoint
from medusa_export.heads.tree import Tree
from medusa_export.quantize.formats import Format, get_kv_cache
from medusa_export.quantize.scales import FP8_MAX, Scales, fused_scale, kv_scale, quantize_fp8

SATURATION_SLACK = 1.01  # a weight may exceed its calibrated amax by rounding, not by belonging to another model


def write_trtllm(
    out: Path,
    checkpoint: MedusaCheckpoint,
    fmt: Format,
    scales: Scales | None,
    *,
    tree: Tree,
    tp: int = 1,
    dtype: str = "auto",
    kv_cache: str = "none",
    quant_heads: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write ``out/config.json`` and ``out/rank{r}.safetensors``; the same inputs give the same bytes.

    Memory is bounded by the largest tensor (about three times its 16-bit bytes while it is quantized). A layout or scales
    that do not fit are refused before the first byte is written. ``int8_wo`` weights are 16 bit in the file: trtllm-build
    quantizes them for its GPU.

    Args:
        scales: from calibration; None for formats without any.
        tree: its size is fixed in the checkpoint, and every decoding step pays for all of it.
        dtype: "float16", "bfloat16", or "auto": the checkpoint's own (float16 for a float32 checkpoint).
        progress: called with (tensors written, tensors in all).

    Raises:
        ConfigError: a combination that TensorRT-LLM cannot build.
        TreeError: a tree deeper than there are heads.
        CheckpointError: missing or foreign scales, or weights that overflow ``dtype``.
        OutputError: a disk that cannot be written.
    """
    spec = export_spec(checkpoint, fmt, tree=tree, tp=tp, dtype=dtype, kv_cache=kv_cache, quant_heads=quant_heads)
    scales = _require_scales(spec, scales)
    plans = plan_ranks(spec)
    total, done = sum(len(plan.tensors) for plan in plans), 0
    _write_config(out, spec)
    for plan in plans:
        with SafetensorsWriter(out / f"rank{plan.rank}.safetensors", plan.tensors) as writer:
            for tensor in writer.entries:
                writer.write(_make(checkpoint, tensor, scales))
                done += 1
                if progress is not None:
                    progress(done, total)


def export_spec(
    checkpoint: MedusaCheckpoint, fmt: Format, *, tree: Tree, tp: int, dtype: str, kv_cache: str, quant_heads: bool
) -> ExportSpec:
    """The layout that :func:`write_trtllm` would write; raises what it would refuse, without touching the disk."""
    tree.require_heads(checkpoint.num_medusa_heads)
    return ExportSpec(
        checkpoint.config,
        checkpoint.num_medusa_heads,
        checkpoint.num_medusa_layers,
        tree.max_draft_len,
        tp,
        fmt,
        resolve_dtype(dtype, checkpoint.config.dtype),
        get_kv_cache(kv_cache),
        quant_heads,
    )


def resolve_dtype(dtype: str, stored: str) -> str:
    """What "auto" stands for: the checkpoint's dtype, or float16 where that is float32."""
    if dtype != "auto":
        return dtype
    return "float16" if stored == "float32" else stored


def _require_scales(spec: ExportSpec, scales: Scales | None) -> Scales:
    modules, layers = scaled_modules(spec), scaled_layers(spec)
    if scales is None and (modules or layers):
        got = f"no scales for format {spec.fmt.name} with kv cache {spec.kv_cache.name}"
        raise ConfigError("scales", got, "the result of a calibration", "calibrate first")
    scales = scales or Scales()
    scales.require(modules, layers)
    return scales


def _write_config(out: Path, spec: ExportSpec) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(trtllm_config(spec), indent=2, sort_keys=True) + "\n"
        (out / "config.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(str(out), str(error), "a writable directory", "pick another path") from error


def _make(checkpoint: MedusaCheckpoint, plan: TensorPlan, scales: Scales) -> torch.Tensor:
    """One planned tensor.  # plan.shape"""
    return _MAKERS[plan.kind](checkpoint, plan, scales)


def _copy(checkpoint: MedusaCheckpoint, plan: TensorPlan, scales: Scales) -> torch.Tensor:
    tensor = _gather(checkpoint, plan, getattr(torch, plan.dtype))
    if not all(torch.isfinite(rows).all() for rows in row_chunks(tensor)):
        raise CheckpointError(
            plan.name,
            f"a value that {plan.dtype} cannot hold",
            "finite weights",
            "use dtype bfloat16, or check the checkpoint for NaN",
        )
    return tensor


def _fp8(checkpoint: MedusaCheckpoint, plan: TensorPlan, scales: Scales) -> torch.Tensor:
    scale = fused_scale(scales.weight_amax, plan.modules)
    weight = _gather(checkpoint, plan, torch.float32)
    low, high = weight.aminmax()
    largest = float(torch.maximum(-low, high))
    if not largest <= scale * FP8_MAX * SATURATION_SLACK:  # NaN compares false
        raise CheckpointError(
            plan.name,
            f"a weight of {largest:.4g}",
            f"at most the calibrated {scale * FP8_MAX:.4g}",
            "calibrate with this very checkpoint",
        )
    quantized = torch.empty(plan.shape, dtype=torch.float8_e4m3fn)
    for rows, source in zip(row_chunks(quantized), row_chunks(weight), strict=True):
        rows.copy_(quantize_fp8(source, scale))
    return quantized


def _gather(checkpoint: MedusaCheckpoint, plan: TensorPlan, dtype: torch.dtype) -> torch.Tensor:
    """The slices stacked on axis 0 and followed by zero rows up to the planned shape."""
    tensor = torch.zeros(plan.shape, dtype=dtype)
    start = 0
    for source in plan.sources:
        part = _read(checkpoint, source)
        tensor[start : start + part.shape[0]].copy_(part)
        start += part.shape[0]
    return tensor


def _read(checkpoint: MedusaCheckpoint, source: Slice) -> torch.Tensor:
    if source.axis is None:
        return checkpoint.read(source.tensor)
    read = checkpoint.read_rows if source.axis == 0 else checkpoint.read_columns
    return read(source.tensor, source.start, source.stop)


def _scalar(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float32)


_MAKERS: dict[Kind, Callable[[MedusaCheckpoint, TensorPlan, Scales], torch.Tensor]] = {
    Kind.COPY: _copy,
    Kind.FP8: _fp8,
    Kind.WEIGHT_SCALE: lambda _, plan, scales: _scalar(fused_scale(scales.weight_amax, plan.modules)),
    Kind.INPUT_SCALE: lambda _, plan, scales: _scalar(fused_scale(scales.input_amax, plan.modules)),
    Kind.KV_SCALE: lambda _, plan, scales: _scalar(kv_scale(scales.kv_amax[plan.layer])),
}
