"""Drafts from the text itself: where its last tokens stood before, what followed then may follow again (prompt lookup decoding).

An index of the places behind every few tokens is kept while the text grows, so that a step asks a table and reads no text.
It needs no heads and no training; source of the idea: https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LENGTHS = (4, 3, 2)  # tokens that have to be the same, the longest first


@dataclass(frozen=True)
class Match:
    """An earlier place of the text's last tokens.

    Attributes:
        length: how many tokens are the same.
        follows: position in the text of what followed them.
    """

    length: int
    follows: int


class TextLookup:
    """A text and its index.

    Args:
        tokens: the text so far; it grows with :meth:`extend`.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens; the latest place of equal tokens replaces an earlier one."""
        text, places = self.tokens, self._places
        start = len(text)
        text += tokens
        for at in range(start, len(text)):
            for length in LENGTHS:
                if length <= at:
                    places[tuple(text[at - length : at])] = at

    def match(self) -> Match | None:
        """Where the last tokens stood before: the longest match, and of equally long ones the latest."""
        for length in LENGTHS:
            if length > len(self.tokens):
                continue
            follows = self._places.get(tuple(self.tokens[-length:]))
            if follows is not None:
                return Match(length, follows)
        return None

    def draft(self, match: Match, count: int) -> list[int]:
        """What followed a match; where the text ends, what was drafted is read on, so that a period goes on.  # [count]"""
        text, drafted = self.tokens, list[int]()
        for at in range(match.follows, match.follows + count):
            drafted.append(text[at] if at < len(text) else drafted[at - len(text)])
        return drafted
