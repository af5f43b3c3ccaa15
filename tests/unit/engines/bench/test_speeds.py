"""Throughputs and their ratios, of decoding and of whole answers, from made-up runs."""

from __future__ import annotations

import pytest

from medusa_export.engines.bench.speeds import DECODING, WHOLE, speedup, tokens_per_second
from tests.unit.engines.bench.test_report import prompt, run


def test_a_prompts_time_is_the_median_over_its_repeats() -> None:
    slow_minute = [prompt("a", "", [130.0, 900.0, 131.0], [70.0, 69.0, 2000.0])]
    assert speedup(slow_minute, WHOLE) == pytest.approx(131 / 70)
    assert speedup(slow_minute, DECODING) == pytest.approx(121 / 60)


def test_speedup_is_of_throughputs_not_a_mean_of_ratios() -> None:
    long, short = prompt("a", "", [1000.0], [500.0]), prompt("b", "", [20.0], [20.0])
    assert speedup([long, short], WHOLE) == pytest.approx(1020 / 520)
    assert speedup([long, short], DECODING) == pytest.approx(1000 / 500)


def test_compared_modes_have_the_same_prompts() -> None:
    """Where the other engine ends at once, the prompt counts for none of the modes."""
    sides = {"other_baseline": [run(13, 240, [1] * 12, 10)], "other_medusa": [run(13, 80, [3] * 4, 10)]}
    both = prompt("a", "code", [130.0], [70.0], **sides)
    other = prompt("b", "code", [1010.0], [1010.0], **(sides | {"other_medusa": [run(1, 0.001, [], 10)]}))
    modes = ("baseline", "medusa", "other_baseline", "other_medusa")
    assert list(tokens_per_second([both, other], DECODING, modes).values()) == pytest.approx([100, 200, 50, 150])
