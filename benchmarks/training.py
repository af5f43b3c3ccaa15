"""Training heads from cached states against ModelOpt and the Trainer: the same command, data, heads and epochs, interleaved.

    python benchmarks/training.py --ckpt model --data data.jsonl

Every run is a process of its own; what its imports take, in time and memory, is measured apart and subtracted. "kept states" is the
training again with the cache that the run before it left: what it lacks against that run is the pass through the base model.
Processor time tells more than seconds where other programs run. This process imports little: Linux counts the memory of whoever
starts a program in that program's peak.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from medusa_export.engines.measure.machine import hardware, versions

PROGRAM = Path(sys.executable).with_name("medusa-train")
COMMON = ["--keep-truncated", "--bf16", "--max-length", "512"]
_IMPORTS = "medusa_export.exporter.cli.train, transformers.modeling_utils, matplotlib.figure, torch.utils.tensorboard"
_CACHED_IMPORTS = f"medusa_export.heads.training.cached.run, {_IMPORTS}"
_REFERENCE_IMPORTS = (
    f"medusa_export.heads.training.full.report, medusa_export.quantize.qat, modelopt.torch.speculative, {_IMPORTS}"
)


@dataclass(frozen=True)
class Side:
    """A way to train: its flags, the modules that it imports, and which cache it leaves or takes, by a name."""

    flags: tuple[str, ...]
    imports: str = _CACHED_IMPORTS
    cache: str | None = None


_CACHED = ("--batch-tokens", "512")
SIDES: dict[str, Side] = {
    "reference (ModelOpt, Trainer)": Side(("--reference", "--batch-size", "4"), _REFERENCE_IMPORTS),
    "cached states": Side(_CACHED, cache="states"),
    "kept states": Side(_CACHED, cache="states"),
    "cached states, 8,192 tokens": Side((*_CACHED, "--loss-vocab", "8192")),
}


@dataclass(frozen=True)
class Run:
    """Of a whole process: seconds, processor time, and peak resident memory in bytes."""

    seconds: float
    cpu: float
    peak: float

    def __sub__(self, other: Run) -> Run:
        return Run(self.seconds - other.seconds, self.cpu - other.cpu, self.peak - other.peak)


def main(
    ckpt: Annotated[Path, typer.Option(help="Hugging Face directory of the base model.")],
    data: Annotated[Path, typer.Option(help="Conversations.")],
    conversations: int = 48,
    epochs: int = 3,
    heads: int = 4,
    repeats: int = 3,
    cases: Annotated[list[str] | None, typer.Option("--case", help="Only these rows; ratios are to the first.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print medians, less what the imports take."""
    sides = {name: SIDES[name] for name in cases or SIDES}
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "data.jsonl"
        part.write_text(
            "\n".join(data.read_text(encoding="utf-8").splitlines()[:conversations]) + "\n", encoding="utf-8"
        )
        flags = ["--ckpt", str(ckpt), "--data", str(part), "--num-heads", str(heads), "--epochs", str(epochs), *COMMON]
        runs: dict[str, list[Run]] = {name: [] for name in sides}
        imports: dict[str, list[Run]] = {side.imports: [] for side in sides.values()}
        for number in range(repeats):
            for modules, found in imports.items():
                found.append(measured_run([sys.executable, "-c", f"import {modules}"]))
            for place, (name, side) in enumerate(sides.items()):
                own = [*side.flags, "--output", f"{folder}/{number}-{place}"]
                own += ["--cache", f"{folder}/{number}-{side.cache}"] if side.cache else []
                runs[name].append(measured_run([str(PROGRAM), *flags, *own]))
        cached = next(place for place, side in enumerate(sides.values()) if side.imports is _CACHED_IMPORTS)
        tokens = json.loads((Path(folder) / f"0-{cached}" / "training.json").read_text())["rows"] * epochs
    medians = {name: median(found) - median(imports[sides[name].imports]) for name, found in runs.items()}
    _report(figures(medians, tokens), tokens, json_file)


def measured_run(command: list[str]) -> Run:
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return Run(time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def median(runs: Sequence[Run]) -> Run:
    """The median of each figure by itself."""
    return Run(*(statistics.median(getattr(run, name) for run in runs) for name in ("seconds", "cpu", "peak")))


def figures(sides: dict[str, Run], tokens: int) -> dict[str, dict[str, float]]:
    """Rates and peaks, and their ratios to the first side's.

    Args:
        tokens: answer tokens that are trained on, times epochs.
    """
    first = next(iter(sides.values()))
    return {
        name: {
            "seconds": side.seconds,
            "cpu_seconds": side.cpu,
            "tokens_per_second": tokens / side.seconds,
            "speed_ratio": first.seconds / side.seconds,
            "cpu_ratio": first.cpu / side.cpu,
            "peak_mb": side.peak / 1e6,
            "peak_ratio": side.peak / first.peak,
        }
        for name, side in sides.items()
    }


def _report(found: dict[str, dict[str, float]], tokens: int, json_file: Path | None) -> None:
    table = Table("training", "s", "tokens/s", "ratio", "processor s", "ratio", "peak MB", "ratio")
    for name, each in found.items():
        table.add_row(
            name, f"{each['seconds']:.1f}", f"{each['tokens_per_second']:.0f}", f"{each['speed_ratio']:.2f}",
            f"{each['cpu_seconds']:.1f}", f"{each['cpu_ratio']:.2f}", f"{each['peak_mb']:.0f}", f"{each['peak_ratio']:.2f}",
        )  # fmt: skip
    Console().print(table)
    if json_file is not None:
        body: dict[str, Any] = {"tokens": tokens, "rows": found, "hardware": hardware(), "versions": versions()}
        json_file.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
