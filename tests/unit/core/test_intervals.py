"""Intervals cover what they should, about as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from medusa_export.core.intervals import bootstrap, median_interval


def test_the_bootstrap_covers_a_ratio_of_means() -> None:
    chance, hits = np.random.default_rng(0), 0
    for trial in range(200):
        rows = np.stack([chance.poisson(6, 60), chance.poisson(3, 60)], axis=1)
        low, high = bootstrap(rows, lambda a, b: a / b, seed=trial)
        hits += low < 2 < high
    assert 180 <= hits <= 199


def test_equal_prompts_leave_no_doubt() -> None:
    assert bootstrap([[3, 2]] * 5, lambda a, b: a / b) == (1.5, 1.5)


def test_the_median_interval_covers_the_median() -> None:
    chance = np.random.default_rng(1)
    intervals = [median_interval(chance.exponential(size=31).tolist()) for _ in range(400)]
    assert 368 <= sum(low < np.log(2) < high for low, high in intervals) <= 399
    assert median_interval([4.0]) == (4.0, 4.0)
    assert median_interval([1.0, 2.0, 9.0]) == pytest.approx((1.0, 9.0))
