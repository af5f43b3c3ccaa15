"""The table by batch and context: the best tree and its tokens a second from counted answers and estimated or given costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medusa_export.engines.tuning.crossover import advice, crossover_rows
from medusa_export.engines.tuning.search import search, sentence, tree_json
from medusa_export.heads.trees.acceptance import Acceptance, Answer
from medusa_export.heads.trees.step_costs import cost_curve


def counted(lookup: bool = True) -> Acceptance:
    """Two prompts; both heads are right half of the time, prompt lookup finds two tokens at every step."""
    chance = np.random.default_rng(0)
    answers = []
    for name in "ab":
        ranks = chance.choice([0, 10], (40, 2))
        ranks[-1], ranks[-2, 1] = -1, -1
        answers.append(Answer(name, "c", ranks, np.full(40, 2) if lookup else None))
    return Acceptance.from_answers(answers)


def curve(slope: float, batch: int = 1, **more: Any) -> dict[str, Any]:
    """A step of 10 ms and ``slope`` for every node more, half of which may be wrong."""
    verify: list[dict[str, Any]] = [{"nodes": 1, "ms": 10.0}]
    for nodes in (2, 64):
        extra = slope * (nodes - 1)
        ratios = (1 + 0.05 * extra, 1 + 0.15 * extra)
        verify.append({"nodes": nodes, "ms": 10.0 + extra, "step_ratio_range": ratios})
    return {"batch": batch, "past_length": 100, "verify": verify, "draft": []} | more


def estimated(slope: float, batch: int = 1) -> dict[str, Any]:
    others = [{"name": "fp8 without Medusa", "ms": 6.0}, {"name": "prompt lookup", "ms": 11.0, "nodes": 11}]
    return curve(slope, batch, estimated="X-1GB", alternatives=others)


def test_rows() -> None:
    flat, steep = crossover_rows(counted(), [estimated(0.1, 4), estimated(20.0)], 63)
    assert flat["max_draft_len"] > 0
    assert flat["tokens_per_second"] == pytest.approx(4 * 1e3 / 10 * flat["speedup"], rel=1e-3)
    assert (flat["without_medusa"], flat["estimated"]) == (400.0, "X-1GB")
    assert flat["alternatives"]["fp8 without Medusa"] == pytest.approx(4 * 1e3 / 6, abs=0.01)
    lookup = counted().lookup()
    assert lookup is not None
    assert lookup[0] == pytest.approx(3.0)  # the last token of an answer is behind a whole number of steps
    assert flat["alternatives"]["prompt lookup"] == pytest.approx(4e3 / 11 * lookup[0], abs=0.01)
    assert (steep["max_draft_len"], steep["speedup"], steep["tokens_per_second"]) == (0, 1.0, 100.0)


def test_what_was_not_counted_is_left_out() -> None:
    (row,) = crossover_rows(counted(lookup=False), [estimated(0.1)], 63)
    assert set(row["alternatives"]) == {"fp8 without Medusa"}
    (measured,) = crossover_rows(counted(), [curve(0.1)], 63)
    assert "estimated" not in measured
    assert "alternatives" not in measured


def test_the_interval_carries_both_uncertainties() -> None:
    acceptance = counted()
    cost = cost_curve(estimated(1.0))
    found = search(acceptance, cost)
    walk = acceptance.walk(found.chosen.tree)
    spread = cost.ratio_range(found.chosen.tree.num_nodes)
    assert walk is not None
    assert spread is not None
    assert found.interval == (walk[1][0] / spread[1], walk[1][1] / spread[0])
    assert found.interval[0] < walk[1][0] / found.chosen.cost_ratio
    assert found.interval[1] > walk[1][1] / found.chosen.cost_ratio
    without_answers = search(Acceptance(acceptance.positions, acceptance.paths), cost)
    assert without_answers.interval is not None
    assert without_answers.interval[0] < without_answers.chosen.speedup < without_answers.interval[1]


def test_everything_says_that_it_is_an_estimate() -> None:
    for slope in (0.1, 20.0):
        found = search(counted(), cost_curve(estimated(slope)))
        assert "costs are estimated for X-1GB, not measured" in sentence(found)
        assert '"estimated": "X-1GB"' in tree_json(found)
    measured = search(counted(), cost_curve(curve(0.1)))
    assert "estimated" not in sentence(measured) + tree_json(measured)


def test_what_is_faster_than_the_best_tree() -> None:
    rows = crossover_rows(counted(), [estimated(0.1), estimated(20.0)], 63)
    text = advice(rows)
    assert text is not None
    assert "fp8 without Medusa" in text
    assert advice([{**row, "alternatives": {"fp8 without Medusa": 1.0}} for row in rows]) is None
    assert advice(crossover_rows(counted(), [curve(0.1)], 63)) is None
