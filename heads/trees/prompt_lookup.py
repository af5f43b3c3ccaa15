"""Prompt lookup: drafts copied from where the last tokens stood before. It needs no heads, so it is what Medusa has to beat.

As Apoorv Saxena's prompt-lookup-decoding does it: where the last three tokens, or fewer, stood first, and the ten behind them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

MAX_NGRAM, DRAFTS = 3, 10


def accepted_lengths(prompt: Sequence[int], answer: Sequence[int]) -> npt.NDArray[np.int64]:
    """How many drafted tokens are right when the answer stands up to each of its tokens.  # [T]"""
    text = [*prompt, *answer]
    found = np.zeros(len(answer), dtype=np.int64)
    for row in range(len(answer)):
        end = len(prompt) + row + 1
        for draft, token in zip(_draft(text[:end]), text[end:], strict=False):
            if draft != token:
                break
            found[row] += 1
    return found


def _draft(text: list[int]) -> list[int]:
    """Tokens that stood behind the last ones before; none where they are new."""
    for size in range(min(MAX_NGRAM, len(text) - 1), 0, -1):
        last = text[-size:]
        for start in range(len(text) - size):
            if text[start : start + size] == last:
                return text[start + size : start + size + DRAFTS]
    return []
