"""What a decode step costs on an engine: warm, interleaved and repeated, by the number of nodes and by the number of heads."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice, product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from medusa_export.engines.base import AUTOREGRESSIVE, StepEngine
from medusa_export.engines.report import hardware, versions
from medusa_export.heads.accept import accept_greedy
from medusa_export.heads.errors import ConfigError
from medusa_export.heads.intervals import median_interval
from medusa_export.heads.tree import Choice, Tree

SIZES = (*range(1, 17), 20, 24, 28, 32, 40, 48, 56, 64)
PAST_LENGTH = 256
ROUNDS = 9
TIMED = 2  # steps in a row that are timed, after one that is not: decoding repeats the same step too
OUTLIER = 5.0  # median absolute deviations above the median


def measure_cost(
    engine: StepEngine,
    *,
    max_nodes: int = max(SIZES),
    past_length: int = PAST_LENGTH,
    rounds: int = ROUNDS,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """One curve of ``cost.json``: medians in milliseconds with intervals and numbers of outliers.

    Every round measures every size and depth once, in another order, so that a slow minute of the machine hits all of them.

    Args:
        max_nodes: the largest tree, its root included.
        past_length: rows in the KV cache before every step.
        progress: called with (rounds done, rounds).

    Raises:
        ConfigError: a past that leaves no room, an engine without heads, or nothing to measure.
    """
    info = engine.info
    trees = {
        nodes: tree for nodes in SIZES if nodes <= max_nodes and (tree := wide_tree(nodes, info.max_depth, info.top_k))
    }
    _check(engine, max(trees, default=0), past_length, rounds)
    engine.prefill([1] * past_length)
    items: list[Tree | int] = [*trees.values(), *range(1, info.max_depth + 1)]
    verify: dict[int, list[float]] = {nodes: [] for nodes in trees}
    draft: dict[int, list[float]] = {depth: [] for depth in range(1, info.max_depth + 1)}
    chance = random.Random(seed)
    for done in range(rounds):
        chance.shuffle(items)
        for item in items:
            if isinstance(item, Tree):
                verify[item.num_nodes] += _verify_times(engine, item, past_length)
            else:
                draft[item] += _draft_times(engine, item, past_length)
        progress(done + 1, rounds)
    return {
        "batch": 1,
        "past_length": past_length,
        "verify": [{"nodes": nodes, **_figures(times)} for nodes, times in verify.items()],
        "draft": [{"depth": depth, **_figures(times)} for depth, times in draft.items()],
    }


def write_costs(path: Path, curves: Sequence[Mapping[str, Any]], engine: StepEngine) -> dict[str, Any]:
    """Write ``cost.json`` and return its body."""
    info = engine.info
    body = {
        "backend": info.backend, "precision": info.precision, "curves": list(curves),
        "hardware": hardware(), "versions": versions(),
    }  # fmt: skip
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    return body


def wide_tree(nodes: int, max_depth: int, top_k: int) -> Tree | None:
    """Any tree of that many nodes, breadth first; the cost depends on their number, not on the shape. None: there is no such tree."""
    paths = (path for depth in range(1, max_depth + 1) for path in product(range(top_k), repeat=depth))
    choices: list[Choice] = list(islice(paths, nodes - 1))
    return Tree.from_choices(choices) if len(choices) == nodes - 1 else None


def _verify_times(engine: StepEngine, tree: Tree, past_length: int) -> list[float]:
    """Milliseconds of steps without their drafts, which run before each as they do in decoding."""
    step, node_ids = engine.prepare(tree), np.ones(tree.num_nodes, dtype=np.int64)
    times = []
    for _ in range(1 + TIMED):
        engine.draft(engine.info.max_depth)
        start = time.perf_counter()
        next_ids = step.verify(node_ids)
        accept_greedy(tree, node_ids, next_ids)
        step.keep(np.zeros(1, dtype=np.int64))
        times.append((time.perf_counter() - start) * 1e3)
        engine.rewind(past_length)
    return times[1:]


def _draft_times(engine: StepEngine, depth: int, past_length: int) -> list[float]:
    step, times = engine.prepare(AUTOREGRESSIVE), []
    for _ in range(1 + TIMED):
        step.verify(np.ones(1, dtype=np.int64))
        engine.rewind(past_length)
        start = time.perf_counter()
        engine.draft(depth)
        times.append((time.perf_counter() - start) * 1e3)
    return times[1:]


def _figures(times: Sequence[float]) -> dict[str, Any]:
    middle = median(times)
    spread = median(abs(value - middle) for value in times)
    low, high = median_interval(times)
    return {
        "ms": round(middle, 4),
        "ci95": [round(low, 4), round(high, 4)],
        "runs": len(times),
        "outliers": sum(value > middle + OUTLIER * spread for value in times),
    }


def _check(engine: StepEngine, largest: int, past_length: int, rounds: int) -> None:
    info = engine.info
    if not info.max_depth:
        raise ConfigError("engine", "no Medusa heads", "an engine with heads", "export with --heads")
    if rounds < 1:
        raise ConfigError("--rounds", f"{rounds}", "1 or more", "correct it")
    if not largest:
        raise ConfigError("--max-nodes", "less than 1", "1 or more", "correct it")
    if not 0 < past_length <= info.max_length - largest:
        limit = f"1 .. {info.max_length - largest}, so that {largest} nodes fit behind it"
        raise ConfigError(
            "--past-length", f"{past_length}", limit, "choose another, or export with a larger --max-length"
        )
