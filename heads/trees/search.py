"""The tree that yields most tokens a second: paths grown by how often the model's own text takes them, size by what a step costs.

A node adds to a step's expected tokens the frequency with which the true continuation passes through it, whatever else is in the
tree (Medusa, arXiv 2401.10774, section 2.3.3). Along a path that frequency never rises, so the most frequent open path is always the
best next node, and the first n nodes grown are the best tree of n nodes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from medusa_export.core.errors import ConfigError
from medusa_export.heads.trees.tree import MAX_TOP_K, Choice, Tree

Frequencies = Mapping[Choice, float]

LEAST_MS, MOST_MS = 1e-6, 1e9  # of a step that was timed: their ratios stay numbers


def grow(frequencies: Frequencies) -> Iterator[Choice]:
    """Paths in the order in which the best tree takes them; each one's parent comes before it.

    Args:
        frequencies: how often the true continuation begins with a path, counts or probabilities; a parent's is no less than its
            children's. Paths without a parent in it are never reached.
    """
    children: dict[Choice, list[Choice]] = {}
    for path in frequencies:
        children.setdefault(path[:-1], []).append(path)
    queue: list[tuple[float, int, Choice]] = []
    parents: list[Choice] = [()]
    while parents or queue:
        for path in (child for parent in parents for child in children.get(parent, ())):
            heapq.heappush(queue, (-frequencies[path], len(path), path))
        if not queue:
            return
        path = heapq.heappop(queue)[2]
        parents = [path]
        yield path


def independent(accuracy: Sequence[Sequence[float]]) -> dict[Choice, float]:
    """Probabilities of paths from accuracies by head and rank alone, as if heads were right independently of each other.

    For published tables that hold no paths, such as FasterDecoding's ``medusa_acc.csv``; counted paths are better.

    Args:
        accuracy: share of positions at which rank r of head h is the true token.  # [H][K]

    Returns:
        every path of them; K + K ** 2 + ... + K ** H, so cut the table to what a tree can hold.
    """
    found: dict[Choice, float] = {}
    level: dict[Choice, float] = {(): 1.0}
    for head in accuracy:
        level = {(*path, rank): p * q for path, p in level.items() for rank, q in enumerate(head[:MAX_TOP_K]) if p * q}
        found |= level
    return found


@dataclass(frozen=True)
class CostCurve:
    """Milliseconds of a decode step: of the base model by the number of nodes, and of the heads by their number.

    Attributes:
        verify_ms: nodes -> milliseconds, the root included; has 1, the step without a tree. Between measured sizes it is linear.
        draft_ms: depth of the tree -> milliseconds of that many heads; empty: they cost nothing, else every depth from 1 on.
        estimated: the GPU that these times were estimated for; None where they were measured.
        ratio_ranges: nodes -> the least and the most that :meth:`ratio` may be; empty where that is not known.
        batch: sequences in a step.
        past_length: tokens of each in the cache; 0 where that is not known.
    """

    verify_ms: Mapping[int, float]
    draft_ms: Mapping[int, float] = field(default_factory=dict)
    estimated: str | None = None
    ratio_ranges: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    batch: int = 1
    past_length: int = 0

    def __post_init__(self) -> None:
        times = [*self.verify_ms.values(), *self.draft_ms.values()]
        wrong = [ms for ms in times if not LEAST_MS <= ms <= MOST_MS]
        if 1 not in self.verify_ms or wrong or sorted(self.draft_ms) != list(range(1, len(self.draft_ms) + 1)):
            got = f"{wrong[0]} ms" if wrong else f"sizes {sorted(self.verify_ms)} and depths {sorted(self.draft_ms)}"
            span = f"times of {LEAST_MS:g} to {MOST_MS:g} ms"
            expected = f"{span} for 1 node, a step without a tree, and others, and for depths from 1 on"
            raise ConfigError("step costs", got, expected, "measure them again")

    @property
    def max_nodes(self) -> int:
        """The largest size measured; nothing is said about larger ones."""
        return max(self.verify_ms)

    def depth(self, frequencies: Frequencies) -> int:
        """The deepest tree whose cost is known."""
        deepest = max(map(len, frequencies), default=0)
        return min(deepest, max(self.draft_ms)) if self.draft_ms else deepest

    def ratio(self, nodes: int, depth: int = 0) -> float:
        """Time of a step with a tree over the time of one without."""
        sizes = sorted(self.verify_ms)
        verify = float(np.interp(nodes, sizes, [self.verify_ms[size] for size in sizes]))
        return (verify + self.draft_ms.get(depth, 0.0)) / self.verify_ms[1]

    def ratio_range(self, nodes: int) -> tuple[float, float] | None:
        """What the ratio of a tree's step may be by the estimate's assumptions; None for measured costs, and without a tree."""
        if nodes == 1 or not self.ratio_ranges:
            return None
        sizes = sorted(self.ratio_ranges)
        low, high = (float(np.interp(nodes, sizes, [self.ratio_ranges[size][end] for size in sizes])) for end in (0, 1))
        return low, high


@dataclass(frozen=True)
class Candidate:
    """The fastest tree of its size.

    Attributes:
        tokens_per_step: expected, at a position drawn at random.
        cost_ratio: its step's time over that of a step without a tree.
        cost_range: what that may be, where it is estimated.
    """

    tree: Tree
    tokens_per_step: float
    cost_ratio: float
    cost_range: tuple[float, float] | None = None

    @property
    def speedup(self) -> float:
        """Predicted speed of decoding over that without a tree, the prefill not counted."""
        return self.tokens_per_step / self.cost_ratio


def candidates(
    frequencies: Frequencies,
    positions: float,
    cost: CostCurve,
    *,
    max_draft_len: int,
    sizes: Sequence[int] | None = None,
) -> list[Candidate]:
    """The fastest tree of every size, smallest first; the first is no tree at all.

    Of a given size and depth, the tree that holds most frequent paths is the fastest, as the cost knows only size and depth.

    Args:
        positions: what frequencies are counted out of; 1 for probabilities.
        max_draft_len: draft nodes at most.
        sizes: only these numbers of nodes, the root included, and 1; None: all.

    Raises:
        ConfigError: positions that are not a positive number, or fewer of them than a path was seen.
    """
    most = max(frequencies.values(), default=0)
    if not positions > 0 or most > positions * (1 + 1e-9):
        got = f"{positions:g} positions and a path seen {most:g} times"
        raise ConfigError("acceptance", got, "no path more often than positions", "calibrate again")
    largest = min(max_draft_len + 1, cost.max_nodes)
    found = {1: Candidate(Tree(()), 1.0, 1.0)}
    for depth in range(1, cost.depth(frequencies) + 1):
        shallow = {path: count for path, count in frequencies.items() if len(path) <= depth}
        choices, expected = list[Choice](), 1.0
        for path in islice(grow(shallow), max(0, largest - 1)):
            choices.append(path)
            expected += frequencies[path] / positions
            nodes = len(choices) + 1
            if sizes is not None and nodes not in sizes:
                continue
            ratio = cost.ratio(nodes, max(map(len, choices)))
            if nodes not in found or expected / ratio > found[nodes].speedup:
                found[nodes] = Candidate(Tree.from_choices(choices), expected, ratio, cost.ratio_range(nodes))
    return [found[nodes] for nodes in sorted(found)]


def best(found: Sequence[Candidate]) -> Candidate:
    """The fastest one; of equally fast ones the smallest, and no tree where none is faster than that."""
    return max(found, key=lambda candidate: (candidate.speedup, -candidate.tree.num_nodes))
