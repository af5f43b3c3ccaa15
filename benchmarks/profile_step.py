"""Where a decode step's time goes, by operator and number of nodes, from ONNX Runtime's own profiler.

python benchmarks/profile_step.py quickstart/out/engine
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from medusa_export.core.errors import ConfigError
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.engines.tuning.cost import wide_tree

SIZES = (1, 2, 4, 8)
RUNS = 15


class ProfiledEngine(OnnxRuntimeEngine):
    """The engine with ONNX Runtime's profiler on."""

    def _options(self, entries: dict[str, str]) -> Any:
        options = super()._options(entries)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(tempfile.gettempdir()) / "medusa-profile")
        return options


def operators(engine: ProfiledEngine, past: int) -> dict[int, dict[str, float]]:
    """Milliseconds of each operator in a step, medians, by number of nodes."""
    engine.prefill([1] * past)
    for nodes in SIZES:
        tree = wide_tree(nodes, engine.info.max_depth, engine.info.top_k)
        if tree is None:
            raise ConfigError("engine", "no Medusa heads", "an engine with heads", "export with --heads")
        step = engine.prepare(tree)
        for _ in range(RUNS):
            step.verify(np.full(nodes, 5))
    trace = Path(engine._decoder.end_profiling())
    events = [event for event in json.loads(trace.read_text()) if event["name"].endswith("_kernel_time")]
    trace.unlink()
    runs = 1 + len(SIZES) * RUNS  # the prefill comes first
    per_run = len(events) // runs
    found: dict[int, dict[str, float]] = {}
    for turn, nodes in enumerate(SIZES):
        samples: dict[str, list[float]] = defaultdict(list)
        for run in range(1 + turn * RUNS + 2, 1 + (turn + 1) * RUNS):  # the first two warm up
            total: Counter[str] = Counter()
            for event in events[run * per_run : (run + 1) * per_run]:
                total[_label(event)] += event["dur"]
            for name, microseconds in total.items():
                samples[name].append(microseconds / 1e3)
        found[nodes] = {name: median(values) for name, values in samples.items()}
    return found


def _label(event: dict[str, Any]) -> str:
    """Operator name; products also by their output width, which tells the projections apart."""
    name = event["args"]["op_name"]
    if not name.startswith("MatMul"):
        return name
    (shape,) = event["args"]["output_type_shape"][0].values()
    return f"{name} -> {shape[-1]}"


def main(
    engine_dir: Annotated[Path, typer.Argument(help="Engine directory of an export.")],
    past: Annotated[int, typer.Option(help="Tokens in the KV cache.")] = 200,
) -> None:
    """Print the table."""
    found = operators(ProfiledEngine(engine_dir), past)
    table = Table("ms in", *(f"{nodes} nodes" for nodes in SIZES))
    for name in sorted(found[SIZES[0]], key=lambda name: -found[SIZES[0]][name]):
        table.add_row(name, *(f"{found[nodes][name]:.2f}" for nodes in SIZES))
    table.add_row("sum", *(f"{sum(found[nodes].values()):.1f}" for nodes in SIZES))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
