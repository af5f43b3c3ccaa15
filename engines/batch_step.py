"""One step of a batch: draft, verify, accept and keep, for every sequence at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt

from medusa_export.engines.batch import BatchDecoder
from medusa_export.heads.tree import Tree

Draw = Callable[[npt.NDArray[Any]], int]  # logits [vocab_size] -> token


def greedy(logits: npt.NDArray[Any]) -> int:
    """The best token.  # [vocab_size]"""
    return int(logits.argmax())


def first_token(decoder: BatchDecoder, input_ids: Sequence[int], draw: Draw) -> int:
    """Admit a prompt; the first token of its answer.

    Raises:
        ConfigError: a prompt that leaves no room, or no free slot.
    """
    return draw(decoder.admit(input_ids))


def advance(decoder: BatchDecoder, tree: Tree, last: Sequence[int], draws: Sequence[Draw]) -> list[list[int]]:
    """The next tokens of every active sequence, at least one each.

    Args:
        tree: of drafts.
        last: the newest token of each sequence, which is not in the cache yet.
        draws: how each sequence chooses.
    """
    logits = decoder.step(last)  # [active, vocab_size]
    return [[draw(row)] for draw, row in zip(draws, logits, strict=True)]
