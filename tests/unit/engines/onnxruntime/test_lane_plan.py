"""Lanes against the best of all ways to cut the sequences, tried one by one."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from medusa_export.engines.onnxruntime.lane_plan import BLOCK, Plan, Traffic, capacity, plan_lanes


def test_capacities_are_whole_blocks() -> None:
    assert [capacity(rows) for rows in (1, BLOCK, BLOCK + 1)] == [BLOCK, BLOCK, 2 * BLOCK]


def test_nobody() -> None:
    assert plan_lanes([], Traffic(10, 1)) == Plan((), (), 0)


@pytest.mark.parametrize(
    ("weights", "slots", "capacities"),
    [(0, ((1, 2, 3), (0,)), (128, 2048)), (3 * 1920 - 1, ((1, 2, 3), (0,)), (128, 2048)), (3 * 1920, ((0, 1, 2, 3),), (2048,))],
)  # fmt: skip
def test_a_long_one_runs_apart_where_it_saves_more_than_the_weights(
    weights: int, slots: tuple[tuple[int, ...], ...], capacities: tuple[int, ...]
) -> None:
    plan = plan_lanes([2000, 100, 5, 128], Traffic(weights, 1))
    assert (plan.slots, plan.capacities) == (slots, capacities)


def test_no_way_to_cut_reads_less() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows, traffic = rng.integers(1, 1500, 5).tolist(), Traffic(int(rng.integers(0, 4000)), 2)
        plan = plan_lanes(rows, traffic)
        assert sorted(slot for lane in plan.slots for slot in lane) == list(range(5))
        costs = [
            sum(
                traffic.cost(lanes.count(lane), max(capacity(row) for row, mine in zip(rows, lanes, strict=True) if mine == lane))
                for lane in set(lanes)
            )
            for lanes in product(range(5), repeat=5)
        ]  # fmt: skip
        assert plan.cost == min(costs)
        for lane, size in zip(plan.slots, plan.capacities, strict=True):
            assert size == max(capacity(rows[slot]) for slot in lane)
