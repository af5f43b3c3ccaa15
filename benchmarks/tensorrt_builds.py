"""What TensorRT-RTX builds ahead of time from a checkpoint: every format for every GPU, with seconds, size and peak memory.

    python benchmarks/tensorrt_builds.py --ckpt quickstart/model --heads examples/smollm2-135m-medusa-v2 --json builds.json

Every build is a process of its own, so that its memory is its own. An engine that was built proves that TensorRT accepts the graph;
neither its speed nor its numbers.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from medusa_export.engines.report import hardware, versions
from medusa_export.engines.tensorrt_build import DECODER_ENGINE, HEADS_ENGINE, TensorRtBuilder
from medusa_export.engines.tensorrt_package import RTX, import_tensorrt
from medusa_export.exporter.job import DEFAULT_CALIB
from medusa_export.exporter.tensorrt_dir import MAX_NODES, write_portable
from medusa_export.heads.conversations import load_prompts, read_tokenizer
from medusa_export.heads.errors import MedusaExportError
from medusa_export.heads.model import MedusaCheckpoint
from medusa_export.heads.tree import PRESETS, Tree
from medusa_export.quantize.calibration import token_batches
from medusa_export.quantize.formats import FORMATS, Format, get_format
from medusa_export.quantize.ptq import calibrate
from medusa_export.quantize.tensorrt_targets import FORMS, parse_gpus

TARGETS = (80, 86, 89, 120)
MAX_LENGTH, DRAFT_VOCAB = 1024, 8192


def main(
    ckpt: Annotated[Path, typer.Option(help="The base model.")],
    heads: Annotated[Path | None, typer.Option(help="Its heads, when they are not inside.")] = None,
    quant: Annotated[list[str] | None, typer.Option(help="Formats; default: all that TensorRT takes.")] = None,
    gpu: Annotated[list[int] | None, typer.Option(help="Compute capabilities; default: 80 86 89 120.")] = None,
    calib_prompts: Annotated[int, typer.Option(help="Prompts that calibrate.")] = 16,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Build everything, print a table."""
    checkpoint = MedusaCheckpoint.open(ckpt, heads)
    length, rows = min(MAX_LENGTH, checkpoint.config.max_position_embeddings), []
    for name in quant or [name for name, form in FORMS.items() if form.form]:
        with tempfile.TemporaryDirectory() as directory:
            onnx = Path(directory) / "onnx"
            _write_graphs(onnx, ckpt, checkpoint, _fitting(name, checkpoint), calib_prompts, length)
            size = sum(path.stat().st_size for path in onnx.iterdir())
            targets = [(sm,) for sm in gpu or TARGETS] + ([TARGETS] if name == "none" and not gpu else [])
            for gpus in targets:
                row = {"quant": name, "gpus": gpus, "onnx_bytes": size, **_build(onnx, name, gpus, length)}
                print(json.dumps(row), file=sys.stderr, flush=True)
                rows.append(row)
    _print(rows)
    if json_file is not None:
        body = {"model": ckpt.name, "hardware": hardware(), "versions": versions() | _tensorrt(), "builds": rows}
        json_file.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def _fitting(name: str, checkpoint: MedusaCheckpoint) -> Format:
    """The format, with the group size that divides the model's inputs where it has a choice."""
    widths = [shape[1] for shape in checkpoint.config.linear_shapes().values()]
    sizes = [size for size in FORMATS[name].group_sizes if all(width % size == 0 for width in widths)]
    return get_format(name, max(sizes, default=None))


def _write_graphs(
    out: Path, ckpt: Path, checkpoint: MedusaCheckpoint, fmt: Format, calib_prompts: int, length: int
) -> None:
    scales = None
    if fmt.needs_calibration:
        batches = token_batches(read_tokenizer(ckpt), load_prompts(DEFAULT_CALIB), max_prompts=calib_prompts)
        scales = calibrate(ckpt, checkpoint, fmt, kv_cache="none", quant_heads=False, batches=batches)
    dtype = "bfloat16" if checkpoint.config.dtype == "bfloat16" else "float16"
    tree = Tree.from_choices(choice for choice in PRESETS["medusa-63"] if len(choice) <= checkpoint.num_medusa_heads)
    vocab = torch.arange(DRAFT_VOCAB) if checkpoint.config.vocab_size > DRAFT_VOCAB else None
    write_portable(out, checkpoint, fmt, scales, dtype=dtype, tree=tree, max_length=length, draft_vocab=vocab)


def _build(onnx: Path, quant: str, gpus: tuple[int, ...], length: int) -> dict[str, Any]:
    """Figures of one build, or why there is none."""
    try:
        parse_gpus(",".join(f"sm{sm}" for sm in gpus), FORMATS[quant])
    except MedusaExportError as error:
        return {"refused": str(error)}
    command = [sys.executable, __file__, "--child", str(onnx), str(length), *map(str, gpus)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        return {"failed": result.stderr.strip().splitlines()[-1]}
    figures: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return figures


def child(onnx: Path, length: int, gpus: tuple[int, ...]) -> None:
    """One build in this process; its figures as JSON on stdout."""
    import_tensorrt(RTX)
    with tempfile.TemporaryDirectory() as out:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        TensorRtBuilder().build(
            onnx, Path(out), lambda stage, done, total: None, gpus=gpus, max_length=length, max_nodes=MAX_NODES,
            nodes=MAX_NODES,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        sizes = {name: (Path(out) / name).stat().st_size for name in (DECODER_ENGINE, HEADS_ENGINE)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": round(seconds, 1), "bytes": sizes, "peak_rss_kib": peak, "libraries_kib": before}))


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table("format", "GPU", "seconds", "decoder MB", "heads MB", "graphs MB", "peak RSS GB")
    for row in rows:
        name, gpus = row["quant"], ", ".join(f"sm{sm}" for sm in row["gpus"])
        if "seconds" not in row:
            table.add_row(name, gpus, "refused" if "refused" in row else "failed")
            continue
        decoder, heads = (f"{row['bytes'][engine] / 1e6:.1f}" for engine in (DECODER_ENGINE, HEADS_ENGINE))
        peak = f"{row['peak_rss_kib'] * 1024 / 1e9:.2f}"
        table.add_row(name, gpus, f"{row['seconds']:.1f}", decoder, heads, f"{row['onnx_bytes'] / 1e6:.1f}", peak)
    Console().print(table)


def _tensorrt() -> dict[str, str]:
    found = import_tensorrt(RTX)
    return {found.name: found.version} if found else {}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), int(sys.argv[3]), tuple(map(int, sys.argv[4:])))
    else:
        typer.run(main)
