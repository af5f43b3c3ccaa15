"""What TensorRT-RTX builds ahead of time from a checkpoint: every format for every GPU, with seconds, size and peak memory.

    python benchmarks/tensorrt_builds.py --ckpt quickstart/model --heads examples/smollm2-135m-medusa-v2 --json builds.json

Every build is a process of its own, so that its memory is its own. An engine that was built proves that TensorRT accepts the graph;
neither its speed nor its numbers. ``--check`` looks at the numbers instead: the same graphs in ONNX Runtime, see tensorrt_numbers.py.
"""

from __future__ import annotations

import json
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

sys.path.insert(0, str(Path(__file__).parent))
from tensorrt_numbers import figures

from medusa_export.core.errors import MedusaExportError
from medusa_export.core.text.prompts import load_prompts
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.measure.machine import hardware, versions
from medusa_export.engines.tensorrt.build import DECODER_ENGINE, HEADS_ENGINE, TensorRtBuilder
from medusa_export.engines.tensorrt.emulation.torch_device import NoTensorRt
from medusa_export.engines.tensorrt.library import RTX, import_tensorrt
from medusa_export.exporter.engine_dirs.tensorrt import MAX_NODES, write_portable, write_tensorrt_engine
from medusa_export.exporter.job.arguments import DEFAULT_CALIB
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.trees.tree import PRESETS, Tree
from medusa_export.quantize.calibration_data import token_batches
from medusa_export.quantize.format_facts import TensorRt
from medusa_export.quantize.formats import FORMATS, Format, get_format
from medusa_export.quantize.ptq import calibrate
from medusa_export.quantize.scales import Scales
from medusa_export.quantize.tensorrt_targets import RTX_TARGETS, parse_gpus, tensorrt_form

MAX_LENGTH, DRAFT_VOCAB = 1024, 8192
ABLE = [name for name, row in FORMATS.items() if isinstance(row.tensorrt, TensorRt)]
CHECK_PROMPTS, CHECK_TOKENS = 4, 128


def main(
    ckpt: Annotated[Path, typer.Option(help="The base model.")],
    heads: Annotated[Path | None, typer.Option(help="Its heads, when they are not inside.")] = None,
    quant: Annotated[list[str] | None, typer.Option(help="Formats; default: all that TensorRT takes.")] = None,
    gpu: Annotated[
        list[int] | None, typer.Option(help="Compute capabilities; default: all that TensorRT-RTX builds for.")
    ] = None,
    calib_prompts: Annotated[int, typer.Option(help="Prompts that calibrate.")] = 16,
    check: Annotated[bool, typer.Option("--check", help="Build nothing; compare the graphs' numbers.")] = False,
    dtype: Annotated[
        list[str] | None, typer.Option(help="Of --check: float16, bfloat16; default: the model's.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Build everything, or check it, and print a table."""
    checkpoint = MedusaCheckpoint.open(ckpt, heads)
    own = "bfloat16" if checkpoint.config.dtype == "bfloat16" else "float16"
    length, rows = min(MAX_LENGTH, checkpoint.config.max_position_embeddings), []
    for name in quant or ABLE:
        weight_format = _fitting(name, checkpoint)
        scales = _scales(ckpt, checkpoint, weight_format, calib_prompts)
        for number in (dtype or [own]) if check else [own]:
            with tempfile.TemporaryDirectory() as directory:
                out = Path(directory)
                write_graphs(out, checkpoint, weight_format, scales, number, length)
                if check:
                    texts = check_texts(ckpt, calib_prompts)
                    found = figures(
                        out / "engine", out / "onnx", ckpt, tensorrt_form(weight_format).form, number, texts
                    )
                    rows.append({"quant": name, "dtype": number, **found})
                else:
                    rows += _builds(out / "onnx", name, gpu, length)
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    (_print_numbers if check else _print)(rows)
    if json_file is not None:
        body: dict[str, Any] = {"model": ckpt.name, "hardware": hardware(), "versions": versions() | _tensorrt()}
        body["numbers" if check else "builds"] = rows
        json_file.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def _builds(onnx: Path, name: str, gpu: list[int] | None, length: int) -> list[dict[str, Any]]:
    """A row a target; of the first format also one for all targets."""
    size = sum(path.stat().st_size for path in onnx.iterdir())
    targets = [(sm,) for sm in gpu or RTX_TARGETS] + (
        [RTX_TARGETS] if not FORMATS[name].is_quantized and not gpu else []
    )
    return [{"quant": name, "gpus": gpus, "onnx_bytes": size, **_build(onnx, name, gpus, length)} for gpus in targets]


def _fitting(name: str, checkpoint: MedusaCheckpoint) -> Format:
    """The format, with the group size that divides the model's inputs where it has a choice."""
    widths = [shape[1] for shape in checkpoint.config.linear_shapes().values()]
    sizes = [size for size in FORMATS[name].group_sizes if all(width % size == 0 for width in widths)]
    return get_format(name, max(sizes, default=None))


def _scales(ckpt: Path, checkpoint: MedusaCheckpoint, weight_format: Format, calib_prompts: int) -> Scales | None:
    if not weight_format.needs_calibration:
        return None
    batches = token_batches(read_tokenizer(ckpt), load_prompts(DEFAULT_CALIB), max_prompts=calib_prompts)
    return calibrate(ckpt, checkpoint, weight_format, kv_cache="none", quant_heads=False, batches=batches)


def check_texts(ckpt: Path, calib_prompts: int) -> list[list[int]]:
    """Prompts that did not calibrate, as far as there are others."""
    prompts = load_prompts(DEFAULT_CALIB)
    prompts = prompts[calib_prompts:] or prompts
    return token_batches(read_tokenizer(ckpt), prompts, max_prompts=CHECK_PROMPTS, max_length=CHECK_TOKENS)


def write_graphs(
    out: Path, checkpoint: MedusaCheckpoint, weight_format: Format, scales: Scales | None, dtype: str, length: int
) -> None:
    """``out/onnx``, and ``out/engine`` without an engine."""
    tree = Tree.from_choices(choice for choice in PRESETS["medusa-63"] if len(choice) <= checkpoint.num_medusa_heads)
    vocab = torch.arange(DRAFT_VOCAB) if checkpoint.config.vocab_size > DRAFT_VOCAB else None
    write_portable(
        out / "onnx", checkpoint, weight_format, scales, dtype=dtype, tree=tree, max_length=length, draft_vocab=vocab
    )
    write_tensorrt_engine(
        out / "engine", out / "onnx", checkpoint, weight_format, gpus=(), dtype=dtype, tree=tree, max_length=length,
        builder=NoTensorRt(), progress=lambda *at: None, save_tokenizer=lambda path: None, source={},
    )  # fmt: skip


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
        before = _peak_kib()
        start = time.perf_counter()
        TensorRtBuilder().build(
            onnx, Path(out), lambda stage, done, total: None, gpus=gpus, max_length=length, max_nodes=MAX_NODES,
            nodes=MAX_NODES,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        sizes = {name: (Path(out) / name).stat().st_size for name in (DECODER_ENGINE, HEADS_ENGINE)}
    print(
        json.dumps({"seconds": round(seconds, 1), "bytes": sizes, "peak_rss_kib": _peak_kib(), "libraries_kib": before})
    )


def _peak_kib() -> int:
    """Of this process alone: getrusage would count what its parent held when it was started."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


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


def _print_numbers(rows: list[dict[str, Any]]) -> None:
    table = Table("format", "dtype", "max", "rms", "own", "same", "KL", "agree", "tree")
    for row in rows:
        error = (f"{row['relative_error']:.2%}", f"{row['own_error']:.2%}")
        shares = (f"{row['same_token']:.1%}", f"{row['kl_mean']:.2g}", f"{row['agreement']:.1%}")
        table.add_row(
            row["quant"], row["dtype"], f"{row['max_error']:.2g}", *error, *shares, f"{row['tree_noise']:.2g}"
        )
    Console(width=110).print(table)


def _tensorrt() -> dict[str, str]:
    found = import_tensorrt(RTX)
    return {found.name: found.version} if found else {}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), int(sys.argv[3]), tuple(map(int, sys.argv[4:])))
    else:
        typer.run(main)
