"""What a decode step costs on an engine: warm, interleaved and repeated, by the number of nodes and of heads, and by the batch."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice, product
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np

from medusa_export.core.artifacts.output_file import write_output
from medusa_export.core.errors import ConfigError
from medusa_export.core.intervals import median_interval
from medusa_export.engines.decoding.drafters import CHAINS, HEAD_NODES
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE, StepEngine
from medusa_export.engines.measure.machine import hardware, versions
from medusa_export.engines.onnxruntime.batch_engine import TreeBatchDecoder
from medusa_export.engines.tuning.defaults import PAST_LENGTH
from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.decoding.accept import accept_greedy
from medusa_export.heads.trees.tree import Choice, Tree

SIZES = (*range(1, 17), 20, 24, 28, 32, 40, 48, 56, 64)
ALWAYS = 1 + max(HEAD_NODES) + max(CHAINS)  # nodes of the largest step that drafts are chosen for one by one
ROUNDS = 9
TRIED = 2  # rounds of all sizes, before some are left out
TIMED = 2  # steps in a row that are timed, after one that is not: decoding repeats the same step too
ROOT = np.zeros(1, dtype=np.int64)
OUTLIER = 5.0  # median absolute deviations above the median


class Steps(Protocol):
    """Something whose steps can be timed again and again behind the same past."""

    info: EngineInfo
    batch: int

    def fill(self, past_length: int) -> None:
        """Sequences of that many tokens."""

    def verify(self, tree: Tree) -> None:
        """A whole step but its draft: verify a tree, accept and keep its root."""

    def draft(self, depth: int) -> object:
        """Candidates of the first heads."""

    def rewind(self, length: int) -> None:
        """Drop what steps have added."""


class SingleSteps:
    """Steps of an engine."""

    batch = 1

    def __init__(self, engine: StepEngine) -> None:
        self.info, self._engine = engine.info, engine
        self.draft, self.rewind = engine.draft, engine.rewind

    def fill(self, past_length: int) -> None:
        self._engine.prefill([1] * past_length)

    def verify(self, tree: Tree) -> None:
        step, node_ids = self._engine.prepare(tree), np.ones(tree.num_nodes, dtype=np.int64)
        accept_greedy(tree, node_ids, step.verify(node_ids))
        step.commit(ROOT)


class BatchSteps:
    """Steps of a batch, all sequences alike.

    Args:
        decoder: one without active sequences and with that many slots.
        batch: sequences in every step.
    """

    def __init__(self, decoder: TreeBatchDecoder, batch: int) -> None:
        self.info, self.batch, self._decoder = decoder.info, batch, decoder
        self.draft, self.rewind = decoder.draft, decoder.rewind

    def fill(self, past_length: int) -> None:
        while self._decoder.active:
            self._decoder.release(0)
        for _ in range(self.batch):
            self._decoder.admit([1] * past_length)

    def verify(self, tree: Tree) -> None:
        node_ids = np.ones((self.batch, tree.num_nodes), dtype=np.int64)
        for next_ids in self._decoder.verify(tree, node_ids):
            accept_greedy(tree, node_ids[0], next_ids)
        self._decoder.commit([ROOT] * self.batch)


def measure_cost(
    steps: Steps,
    *,
    sizes: Sequence[int] = SIZES,
    max_nodes: int | None = None,
    past_length: int | None = None,
    rounds: int = ROUNDS,
    most_tokens: float = math.inf,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """One curve of ``cost.json``: medians in milliseconds with intervals and numbers of outliers.

    Every round measures every size and depth once, in another order, so that a slow minute of the machine hits all of them.

    Args:
        sizes: of trees, their roots included; 1 is among them.
        max_nodes: the largest of them that is measured. None: the largest that fits behind the past.
        past_length: rows in the KV cache before every step. None: :func:`usual_past_length`.
        most_tokens: that a step may ever yield. Trees whose steps cost more than so many without one cannot pay: those of more than
            ALWAYS nodes are left out after TRIED rounds.
        progress: called with (rounds done, rounds).

    Raises:
        ConfigError: a past that leaves no room, an engine without heads, or nothing to measure.
    """
    info = steps.info
    past_length = usual_past_length(info) if past_length is None else past_length
    trees = timed_trees(info, sizes=sizes, max_nodes=max_nodes, past_length=past_length)
    if rounds < 1:
        raise ConfigError("--rounds", f"{rounds}", "1 or more", "correct it")
    steps.fill(past_length)
    items: list[Tree | int] = [*trees.values(), *range(1, info.max_depth + 1)]
    verify: dict[int, list[float]] = {nodes: [] for nodes in trees}
    draft: dict[int, list[float]] = {depth: [] for depth in range(1, info.max_depth + 1)}
    chance = random.Random(seed)
    for done in range(rounds):
        chance.shuffle(items)
        for item in items:
            if isinstance(item, Tree):
                verify[item.num_nodes] += _verify_times(steps, item, past_length)
            else:
                draft[item] += _draft_times(steps, item, past_length)
        if done + 1 == TRIED:
            largest = _largest_that_may_pay(verify, most_tokens)
            items = [item for item in items if isinstance(item, int) or item.num_nodes <= largest]
        progress(done + 1, rounds)
    return {
        "batch": steps.batch,
        "past_length": past_length,
        "verify": [{"nodes": nodes, **_figures(times)} for nodes, times in verify.items()],
        "draft": [{"depth": depth, **_figures(times)} for depth, times in draft.items()],
    }


def usual_past_length(info: EngineInfo) -> int:
    """Where costs are measured unless something else is asked for: 256 tokens, or half of a small context."""
    return min(PAST_LENGTH, info.max_length // 2)


def timed_trees(
    info: EngineInfo, *, sizes: Sequence[int] = SIZES, max_nodes: int | None = None, past_length: int
) -> dict[int, Tree]:
    """Trees whose steps :func:`measure_cost` times, by their nodes; runs nothing.

    Args:
        info: of the engine.
        sizes: as there.
        max_nodes: as there.
        past_length: rows in the KV cache before every step.

    Raises:
        ConfigError: a past that leaves no room, an engine without heads, or no size at all.
    """
    if not info.max_depth:
        raise ConfigError("engine", "no Medusa heads", "an engine with heads", "export with --heads")
    limit = max(1, info.max_length - past_length) if max_nodes is None else max_nodes
    trees = {
        nodes: tree for nodes in sizes if nodes <= limit and (tree := wide_tree(nodes, info.max_depth, info.top_k))
    }
    if not trees:
        raise ConfigError("--max-nodes", "less than 1", "1 or more", "correct it")
    needed = 1 if max_nodes is None else max(trees)
    if not 0 < past_length <= info.max_length - needed:
        fit = "1 node fits" if needed == 1 else f"{needed} nodes fit"
        expected = f"1 .. {info.max_length - needed}, so that {fit} behind it"
        lower = "choose another" if max_nodes is None else "lower it or --max-nodes"
        action = f"{lower}, or export with a larger --max-length"
        raise ConfigError("--past-length", f"{past_length}", expected, action)
    return trees


def _largest_that_may_pay(verify: Mapping[int, Sequence[float]], most_tokens: float) -> int:
    """Nodes. Other work on the machine slows steps down, so the slowest of one node is compared with the fastest of many."""
    limit = most_tokens * max(verify[1])
    return max(nodes for nodes, times in verify.items() if nodes <= ALWAYS or min(times) <= limit)


def write_costs(path: Path, curves: Sequence[Mapping[str, Any]], info: EngineInfo) -> dict[str, Any]:
    """Write ``cost.json`` and return its body.

    Args:
        path: of the file.
        curves: rows, see :func:`measure_cost`.
        info: of the engine that was measured.
    """
    body = {
        "backend": info.backend, "precision": info.precision, "curves": list(curves),
        "hardware": hardware(), "versions": versions(),
    }  # fmt: skip
    write_output(path, json.dumps(body, indent=1) + "\n")
    return body


def wide_tree(nodes: int, max_depth: int, top_k: int) -> Tree | None:
    """Any tree of that many nodes, breadth first; the cost depends on their number, not on the shape. None: there is no such tree.

    Args:
        nodes: with the root.
        max_depth: heads of the engine.
        top_k: candidates of each.
    """
    paths = (path for depth in range(1, max_depth + 1) for path in product(range(top_k), repeat=depth))
    choices: list[Choice] = list(islice(paths, nodes - 1))
    return Tree.from_choices(choices) if len(choices) == nodes - 1 else None


def _verify_times(steps: Steps, tree: Tree, past_length: int) -> list[float]:
    """Milliseconds of steps without their drafts, which run before each as they do in decoding."""

    def draft_first() -> None:
        steps.draft(steps.info.max_depth)

    return _times(steps, draft_first, lambda: steps.verify(tree), past_length)


def _draft_times(steps: Steps, depth: int, past_length: int) -> list[float]:
    return _times(steps, lambda: steps.verify(AUTOREGRESSIVE), lambda: steps.draft(depth), past_length)


def _times(steps: Steps, before: Callable[[], object], timed: Callable[[], object], past_length: int) -> list[float]:
    times = []
    for _ in range(1 + TIMED):
        before()
        start = time.perf_counter()
        timed()
        times.append((time.perf_counter() - start) * 1e3)
        steps.rewind(past_length)
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
