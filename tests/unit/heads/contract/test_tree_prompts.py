"""Which prompts a tree is measured on, by their lengths alone."""

from __future__ import annotations

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.heads.contract.tree_prompts import MAX_PROMPTS, NEW_TOKENS, prompts_to_run


def test_those_that_fit() -> None:
    assert prompts_to_run([10, 11, 5000, 3], NEW_TOKENS + 10) == [0, 3]


def test_many_are_spread_evenly() -> None:
    chosen = prompts_to_run([5] * 200, 500)
    assert chosen == list(range(0, 200, 4))
    assert len(chosen) <= MAX_PROMPTS < len(prompts_to_run([5] * MAX_PROMPTS, 500)) + 1


@pytest.mark.parametrize(
    ("lengths", "max_length", "message"),
    [
        ([40, 33], 128, "got prompts of 33 tokens and more; expected one of at most 32; raise --max-length"),
        ([1], 96, "got a context of 96 tokens; expected 97 or more"),
    ],
)
def test_none_fits(lengths: list[int], max_length: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prompts_to_run(lengths, max_length)
