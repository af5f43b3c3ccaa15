"""Trees by frequency and cost: exact against all trees of small cases, and monotone where it has to be."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa_export.core.errors import ConfigError
from medusa_export.heads.trees.search import Candidate, CostCurve, best, candidates, grow, independent
from medusa_export.heads.trees.tree import PRESETS, Choice, Tree

RANKS, HEADS = 3, 3
FLAT = CostCurve({1: 2.0, 64: 2.0})


def counted(rows: list[list[int]]) -> dict[Choice, float]:
    """Frequencies of true paths; a rank of RANKS or above ends one."""
    found: dict[Choice, float] = {}
    for row in rows:
        for depth in range(1, HEADS + 1):
            if row[depth - 1] >= RANKS:
                break
            found[tuple(row[:depth])] = found.get(tuple(row[:depth]), 0) + 1
    return found


def accepted(choices: set[Choice], row: list[int]) -> int:
    """Tokens of a step from this position, walked as an engine walks."""
    depth = 0
    while depth < HEADS and tuple(row[: depth + 1]) in choices:
        depth += 1
    return depth + 1


ROWS = st.lists(st.lists(st.integers(0, RANKS), min_size=HEADS, max_size=HEADS), min_size=1, max_size=40)


@given(ROWS, st.integers(1, 4))
def test_no_tree_of_the_size_is_better(rows: list[list[int]], size: int) -> None:
    frequencies = counted(rows)
    possible = [set(part) for part in combinations(frequencies, min(size, len(frequencies)))]
    closed = [part for part in possible if all(len(path) == 1 or path[:-1] in part for path in part)]
    wanted = max(np.mean([accepted(part, row) for row in rows]) for part in closed)
    found = candidates(frequencies, len(rows), FLAT, max_draft_len=size)[-1]
    assert found.tokens_per_step == pytest.approx(wanted)
    assert found.tokens_per_step == pytest.approx(np.mean([accepted(set(found.tree.choices), row) for row in rows]))


@given(ROWS)
def test_parents_come_first_and_frequencies_never_rise(rows: list[list[int]]) -> None:
    frequencies = counted(rows)
    order = list(grow(frequencies))
    assert sorted(order) == sorted(frequencies)
    assert all(len(path) == 1 or order.index(path[:-1]) < order.index(path) for path in order)
    values = [frequencies[path] for path in order]
    assert values == sorted(values, reverse=True)


def test_paths_without_a_parent_are_not_reached() -> None:
    assert list(grow({(0,): 3, (1, 0): 2})) == [(0,)]


def test_joint_frequencies_are_not_the_product_of_the_heads() -> None:
    """Where head 1 is right only when head 0 is wrong, depth pays nothing: independence would say otherwise."""
    rows = [[0, RANKS, RANKS]] * 5 + [[1, 0, RANKS]] * 4 + [[RANKS, 0, RANKS]]
    assert list(grow(counted(rows)))[:3] == [(0,), (1,), (1, 0)]
    assert list(grow(independent([[0.5, 0.4], [0.5]])))[:3] == [(0,), (1,), (0, 0)]


def test_independent_probabilities() -> None:
    found = independent([[0.5, 0.25], [0.5]])
    assert found == {(0,): 0.5, (1,): 0.25, (0, 0): 0.25, (1, 0): 0.125}
    [*_, last] = candidates(found, 1, FLAT, max_draft_len=3)
    assert last.tree.choices == ((0,), (1,), (0, 0))
    assert last.tokens_per_step == 2.0


def test_the_size_follows_the_cost() -> None:
    frequencies: dict[Choice, float] = {(0,): 0.5, (1,): 0.2, (2,): 0.1}
    for step_ms, wanted in [
        ({1: 10.0, 4: 10.0}, 3),  # nodes cost nothing
        ({1: 10.0, 2: 11.0, 3: 14.0, 4: 20.0}, 1),
        ({1: 10.0, 2: 16.0, 4: 30.0}, 0),  # nothing pays
        ({1: 10.0, 3: 14.0}, 1),  # interpolated: 2 nodes take 12
    ]:
        chosen = best(candidates(frequencies, 1, CostCurve(step_ms), max_draft_len=10))
        assert chosen.tree.max_draft_len == wanted
    assert chosen.speedup == pytest.approx(1.5 / 1.2)


def test_limits() -> None:
    frequencies: dict[Choice, float] = {(rank,): 0.1 for rank in range(8)}
    sizes = [found.tree.num_nodes for found in candidates(frequencies, 1, FLAT, max_draft_len=7, sizes=(4, 8, 9))]
    assert sizes == [1, 4, 8]
    assert len(candidates(frequencies, 1, CostCurve({1: 1.0, 3: 1.0}), max_draft_len=63)) == 3


def test_of_equals_the_smallest() -> None:
    one, two = Tree.from_choices([(0,)]), Tree.from_choices([(0,), (1,)])
    assert best([Candidate(two, 1.5, 1.0), Candidate(one, 1.5, 1.0)]).tree == one


@pytest.mark.parametrize("step_ms", [{}, {2: 1.0}, {1: 0.0}, {1: 1.0, 2: float("nan")}, {1: float("inf")}])
def test_wrong_costs(step_ms: dict[int, float]) -> None:
    with pytest.raises(ConfigError, match="measure them again"):
        CostCurve(step_ms)


@pytest.mark.parametrize("positions", [0, -1, 3, float("nan")])
def test_wrong_acceptance(positions: float) -> None:
    with pytest.raises(ConfigError, match="calibrate again"):
        candidates({(0,): 4}, positions, FLAT, max_draft_len=3)


# Top 1 to top 5 of the heads of the 7b run in FasterDecoding/Medusa's assets/medusa_acc.csv, rounded to six digits.
PUBLISHED = [
    [0.560388, 0.671720, 0.727137, 0.759940, 0.779945],
    [0.316352, 0.423583, 0.485089, 0.528206, 0.562500],
    [0.201044, 0.287898, 0.347540, 0.383449, 0.416874],
    [0.147366, 0.225025, 0.273733, 0.310885, 0.339712],
]


def expected(tree: Tree, frequencies: dict[Choice, float]) -> float:
    return 1 + sum(frequencies.get(choice, 0.0) for choice in tree.choices)


@pytest.mark.parametrize("size", [8, 63])
def test_on_the_published_accuracies_no_shipped_tree_is_better(size: int) -> None:
    frequencies = independent(np.diff(PUBLISHED, prepend=0.0, axis=1).tolist())
    grown = candidates(frequencies, 1.0, FLAT, max_draft_len=size)[-1]
    shipped = {name: Tree.from_choices(choices) for name, choices in PRESETS.items()}
    rivals = [expected(tree, frequencies) for tree in shipped.values() if tree.max_draft_len <= size]
    assert grown.tree.max_draft_len == size
    assert grown.tokens_per_step == pytest.approx(expected(grown.tree, frequencies))
    assert grown.tokens_per_step >= max(rivals)
    assert grown.tokens_per_step == pytest.approx({8: 2.0698, 63: 2.3845}[size], abs=1e-4)


def test_costs_by_hand() -> None:
    ranges = {1: (1.0, 1.0), 5: (1.2, 2.0), 9: (1.4, 4.0)}
    cost = CostCurve({1: 10.0, 5: 14.0, 9: 30.0}, {1: 1.0, 2: 3.0}, "H100", ranges)
    assert cost.max_nodes == 9
    assert [cost.ratio(nodes) for nodes in (1, 3, 5, 7)] == pytest.approx([1.0, 1.2, 1.4, 2.2])
    assert [cost.ratio(5, depth) for depth in (1, 2, 3)] == pytest.approx([1.5, 1.7, 1.4])
    assert cost.ratio_range(1) is None
    assert cost.ratio_range(5) == pytest.approx((1.2, 2.0))
    assert cost.ratio_range(7) == pytest.approx((1.3, 3.0))
    assert FLAT.ratio_range(5) is None
    assert cost.depth({(0,): 3, (0, 0): 2, (0, 0, 0): 1}) == 2  # of so many heads the cost is known
    assert cost.depth({(0,): 3}) == 1
    assert FLAT.depth({(0,): 3, (0, 0): 2, (0, 0, 0): 1}) == 3


def test_candidates_say_what_their_steps_cost() -> None:
    frequencies = {(0,): 8.0, (1,): 2.0, (0, 0): 4.0}
    cost = CostCurve({1: 10.0, 4: 10.0}, {1: 5.0, 2: 10.0}, "H100", {1: (1.0, 1.0), 4: (1.1, 2.0)})
    found = candidates(frequencies, 10, cost, max_draft_len=9)
    assert [(each.tree.num_nodes, each.tokens_per_step, each.cost_ratio) for each in found] == [
        (1, 1.0, 1.0), (2, pytest.approx(1.8), 1.5), (3, pytest.approx(2.0), 1.5), (4, pytest.approx(2.4), 2.0),
    ]  # fmt: skip
    assert found[2].tree.choices == ((0,), (1,)), "as deep as (0, 0) a step would cost more than it gives"
    assert [each.cost_range for each in found[:2]] == [None, pytest.approx((1 + 0.1 / 3, 1 + 1 / 3))]
    assert [each.tree.num_nodes for each in candidates(frequencies, 10, cost, max_draft_len=9, sizes=[3])] == [1, 3]
