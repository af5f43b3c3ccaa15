"""What a step costs on an engine, by number of nodes: the decoder, the heads, and what lies outside ONNX Runtime.

    python benchmarks/steps.py quickstart/out/engine

All sizes run interleaved, after a warm-up, behind a past of --past tokens; medians, and ratios to one node.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from itertools import product
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from medusa_export.engines.onnxruntime import OnnxRuntimeEngine
from medusa_export.engines.report import hardware, versions
from medusa_export.heads.tree import Tree

SIZES = (1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 32, 64)


def wide_tree(nodes: int) -> Tree:
    """Any tree of that many nodes: four children each, breadth first (the cost depends on the count, not on the shape)."""
    choices = [path for depth in (1, 2, 3) for path in product(range(4), repeat=depth)]
    return Tree.from_choices(choices[: nodes - 1])


def measure(engine: OnnxRuntimeEngine, past: int, repeats: int) -> list[dict[str, float]]:
    """Medians in milliseconds by size."""
    times: dict[int, list[tuple[float, float]]] = defaultdict(list)
    prompt = [1] * past
    trees = [wide_tree(nodes) for nodes in SIZES]
    for repeat in range(repeats + 2):
        for tree in trees if repeat % 2 else trees[::-1]:
            engine.prefill(prompt)
            step, ids = engine.prepare(tree), np.full(tree.num_nodes, 5)
            step.verify(ids)
            before, start = engine.backend_seconds, time.perf_counter()
            step.verify(ids)
            whole, inside = time.perf_counter() - start, engine.backend_seconds - before
            if repeat >= 2:
                times[tree.num_nodes].append((whole * 1e3, inside * 1e3))
    return [
        {
            "nodes": nodes,
            "step_ms": median(whole for whole, _ in rows),
            "overhead_ms": median(whole - inside for whole, inside in rows),
        }
        for nodes, rows in times.items()
    ]


def main(
    engine_dir: Annotated[Path, typer.Argument(help="Engine directory of an export.")],
    past: Annotated[int, typer.Option(help="Tokens in the KV cache.")] = 200,
    repeats: Annotated[int, typer.Option(help="Interleaved repetitions.")] = 15,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Print the cost curve of an engine."""
    engine = OnnxRuntimeEngine(engine_dir)
    rows = measure(engine, past, repeats)
    rows.sort(key=lambda row: row["nodes"])
    table = Table("nodes", "step ms", "ratio", "outside ms", title=f"{engine.info.precision}, past {past}")
    for row in rows:
        ratio = row["step_ms"] / rows[0]["step_ms"]
        table.add_row(str(row["nodes"]), f"{row['step_ms']:.1f}", f"{ratio:.2f}", f"{row['overhead_ms']:.3f}")
    Console().print(table)
    if json_file:
        body = {"past": past, "rows": rows, "hardware": hardware(), "versions": versions()}
        json_file.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
