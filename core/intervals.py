"""Confidence intervals of what is measured over prompts: answers of one prompt hang together, so prompts are what is drawn anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

SAMPLES = 2000
PERCENTILES = (2.5, 97.5)
FEWEST = 3  # prompts that an interval over prompts says something of

Array = npt.NDArray[Any]


def bootstrap(
    rows: Sequence[Sequence[float]] | Array, statistic: Callable[..., Array], *, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile bootstrap of a statistic of sums over prompts.

    Args:
        rows: what every prompt adds to each sum.  # [P, C]
        statistic: gets the C sums, each of all samples at once, and gives a value a sample.  # C x [S] -> [S]
    """
    columns = np.asarray(rows, dtype=np.float64)
    count = len(columns)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=SAMPLES)  # [S, P]
    low, high = np.percentile(statistic(*(drawn @ columns).T), PERCENTILES)
    return float(low), float(high)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the median from order statistics, without assuming a distribution; all of few values."""
    ordered = sorted(values)
    reach = 0.98 * len(ordered) ** 0.5  # half of 1.96 standard deviations of a binomial count
    low, high = int(len(ordered) / 2 - reach), int(len(ordered) / 2 + reach)
    return ordered[max(0, low)], ordered[min(len(ordered) - 1, high)]
