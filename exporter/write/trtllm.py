"""Writes a TensorRT-LLM Medusa checkpoint: config.json and one safetensors file a rank, a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from medusa_export.core.artifacts.hashing import WrittenFile
from medusa_export.core.errors import OutputError
from medusa_export.exporter.plan.spec import ExportSpec, export_spec
from medusa_export.exporter.plan.trtllm_config import trtllm_config
from medusa_export.exporter.plan.trtllm_layout import plan_rank, require_scales
from medusa_export.exporter.write.safetensors import SafetensorsWriter
from medusa_export.exporter.write.tensor_maker import TensorMaker
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.trees.tree import Tree
from medusa_export.quantize.formats import Format
from medusa_export.quantize.scales import Scales


def write_trtllm(
    out: Path,
    checkpoint: MedusaCheckpoint,
    weight_format: Format,
    scales: Scales | None,
    *,
    tree: Tree,
    tp: int = 1,
    dtype: str = "auto",
    kv_cache: str = "none",
    quant_heads: bool = False,
    exclude: tuple[str, ...] = (),
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write ``out/config.json`` and ``out/rank{r}.safetensors``; the same inputs give the same bytes.

    Memory is bounded by a chunk of rows, whatever the size of tensors. A layout or scales that do not fit are refused
    before the first byte is written. ``int8_wo`` and ``int4_wo`` weights are 16 bit in the file: trtllm-build quantizes
    them for its GPU.

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
    spec = export_spec(
        checkpoint,
        weight_format,
        tree=tree,
        tp=tp,
        dtype=dtype,
        kv_cache=kv_cache,
        quant_heads=quant_heads,
        exclude=exclude,
    )
    scales = require_scales(spec, scales)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(str(out), str(error), "a writable directory", "pick another path") from error
    write_config(out / "config.json", spec)
    for rank in range(spec.tp):
        write_rank(out / f"rank{rank}.safetensors", checkpoint, spec, scales, rank, progress)


def write_config(path: Path, spec: ExportSpec) -> None:
    """The checkpoint's config.json."""
    path.write_text(json.dumps(trtllm_config(spec), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_rank(
    path: Path,
    checkpoint: MedusaCheckpoint,
    spec: ExportSpec,
    scales: Scales,
    rank: int,
    progress: Callable[[int, int], None] | None = None,
    follow: Callable[[Path], Callable[[str], object]] | None = None,
) -> WrittenFile:
    """One rank's safetensors file.

    Args:
        scales: as :func:`require_scales` returned them.
        progress: called with (bytes written, bytes in all).
        follow: called with the path once the file has its header and its length; what it returns gets the name of every tensor
            that has been written, on another thread.
    """
    with SafetensorsWriter(path, plan_rank(spec, rank).tensors) as writer:
        written = follow(path) if follow else None
        maker = TensorMaker(checkpoint, spec, scales)
        total, done = sum(entry.nbytes for entry in writer.entries), 0
        for plan in writer.entries:
            writer.write(maker.rows(plan))
            if written:
                writer.follow(written, plan.name)
            done += plan.nbytes
            if progress is not None:
                progress(done, total)
    return writer.written
