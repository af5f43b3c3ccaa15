"""Training heads from cached states against ModelOpt and the Trainer: the same command, data, heads and epochs, interleaved."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

PROGRAM = Path(sys.executable).with_name("medusa-train")
COMMON = ["--keep-truncated", "--bf16", "--max-length", "512"]
SIDES: dict[str, list[str]] = {
    "reference (ModelOpt, Trainer)": ["--reference", "--batch-size", "4"],
    "cached states": ["--batch-tokens", "512"],
    "cached states, 8,192 tokens": ["--batch-tokens", "512", "--loss-vocab", "8192"],
}


@dataclass(frozen=True)
class Run:
    """One run of the command: seconds of the whole process, and its peak resident memory in bytes."""

    seconds: float
    peak: int


def main(
    ckpt: Annotated[Path, typer.Option(help="Hugging Face directory of the base model.")],
    data: Annotated[Path, typer.Option(help="Conversations.")],
    conversations: int = 48,
    epochs: int = 3,
    heads: int = 4,
    repeats: int = 3,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print medians, less what it takes to start the command."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "data.jsonl"
        part.write_text(
            "\n".join(data.read_text(encoding="utf-8").splitlines()[:conversations]) + "\n", encoding="utf-8"
        )
        flags = ["--ckpt", str(ckpt), "--data", str(part), "--num-heads", str(heads), "--epochs", str(epochs), *COMMON]
        start = _run([sys.executable, "-c", "import medusa_export.heads.reference_training"])
        runs: dict[str, list[Run]] = {name: [] for name in SIDES}
        for number in range(repeats):
            for side, (name, own) in enumerate(SIDES.items()):
                output = Path(folder) / f"{number}-{side}"
                runs[name].append(_run([str(PROGRAM), *flags, *own, "--output", str(output)]))
        tokens = json.loads((Path(folder) / "0-1" / "training.json").read_text())["rows"] * epochs
    _report({name: _medians(found, start, tokens) for name, found in runs.items()}, json_file)


def _run(command: list[str]) -> Run:
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return Run(time.monotonic() - started, usage.ru_maxrss * 1024)


def _medians(runs: list[Run], start: Run, tokens: int) -> dict[str, float]:
    seconds = statistics.median(run.seconds for run in runs) - start.seconds
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_mb": (statistics.median(run.peak for run in runs) - start.peak) / 1e6,
    }


def _report(found: dict[str, dict[str, float]], json_file: Path | None) -> None:
    table = Table("training", "s", "tokens/s", "ratio", "peak MB", "ratio")
    first: dict[str, Any] = next(iter(found.values()))
    for name, each in found.items():
        speed, memory = each["tokens_per_second"], each["peak_mb"]
        table.add_row(
            name, f"{each['seconds']:.1f}", f"{speed:.0f}", f"{speed / first['tokens_per_second']:.2f}",
            f"{memory:.0f}", f"{memory / first['peak_mb']:.2f}",
        )  # fmt: skip
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
