"""Drafts from the text against a search through it."""

from __future__ import annotations

import random

from medusa_export.engines.decoding.lookup import LENGTHS, Match, TextLookup


def searched(text: list[int]) -> Match | None:
    """The definition: the longest end that stood before, the latest place of it that something followed."""
    for length in LENGTHS:
        for at in range(len(text) - 1, length - 1, -1):
            if len(text) >= length and text[at - length : at] == text[-length:]:
                return Match(length, at)
    return None


def test_the_index_is_a_search_whatever_the_pieces() -> None:
    chance, lengths = random.Random(3), set()
    for _ in range(60):
        text = [chance.randrange(4) for _ in range(chance.randrange(1, 40))]
        cut = chance.randrange(len(text) + 1)
        lookup = TextLookup(text[:cut])
        lookup.extend(text[cut:])
        match = lookup.match()
        assert match == searched(text)
        lengths.add(match.length if match else 0)
    assert lengths == {0, *LENGTHS}


def test_the_latest_of_two_places_counts() -> None:
    lookup = TextLookup([1, 2, 3, 8, 1, 2, 4, 9, 1, 2])
    match = lookup.match()
    assert match == Match(2, 6)
    assert lookup.draft(match, 3) == [4, 9, 1]


def test_a_period_goes_on_behind_the_end_of_the_text() -> None:
    lookup = TextLookup([7, 1, 2, 3, 1, 2, 3, 1])
    match = lookup.match()
    assert match == Match(4, 5)
    assert lookup.draft(match, 8) == [2, 3, 1, 2, 3, 1, 2, 3]


def test_short_texts() -> None:
    for text in ([5], [5, 5], [5, 6, 7]):
        assert TextLookup(text).match() is None
    assert TextLookup([5, 5, 5]).match() == Match(2, 2)
