"""What prompt lookup would have got right, on texts short enough to see it."""

from __future__ import annotations

import pytest

from medusa_export.heads.trees.prompt_lookup import DRAFTS, accepted_lengths


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ([1, 2, 3], [4, 5, 6], [0, 0, 0]),  # nothing comes again
        ([1, 2, 3, 4, 5], [1, 2, 3, 9], [2, 1, 0, 0]),  # copied up to where it differs
        ([7, 1, 8, 2, 3, 1, 9], [2, 3, 1, 9], [3, 2, 1, 0]),
        ([1, 2, 3, 4, 0], [1, 2, 9, 4], [1, 0, 0, 0]),  # what is right behind the first wrong one does not count
        ([5, 6, 7, 0, 6, 8], [6, 7], [1, 0]),  # the first place of a single token wins
        (
            [1, 2, 3, 4, 0, 9, 3, 5],
            [1, 2, 3, 4],
            [3, 2, 1, 0],
        ),  # more tokens in a row win over an earlier place of fewer
    ],
)
def test_texts(prompt: list[int], answer: list[int], expected: list[int]) -> None:
    assert accepted_lengths(prompt, answer).tolist() == expected


def test_no_more_than_it_drafts() -> None:
    text = list(range(100, 130))
    found = accepted_lengths(text, text)
    assert found.max() == DRAFTS
    assert found[0] == DRAFTS


def test_the_answer_is_looked_up_too() -> None:
    assert accepted_lengths([0], [1, 2, 3, 1, 2, 3]).tolist() == [0, 0, 0, 2, 1, 0]
