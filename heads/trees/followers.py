"""What follows a token in texts of a kind: heads guess behind a token that they do not know, and the drafter knows it.

A head sees the hidden state that the newest token was chosen from, not the token itself. Counts of pairs of tokens tell which of the
head's candidates often stand behind it. ``medusa-train`` counts them in its data, an export takes the file along, and the drafter
orders candidates by both. Nothing else changes: what is drafted is verified as before.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medusa_export.core.errors import ConfigError
from medusa_export.heads.trees.acceptance import ABSENT, UNKNOWN, accuracies, mean_accuracy

FOLLOWERS_FILE = "followers.npz"
# What numpy and zipfile raise on files that are damaged; RuntimeError: encrypted, or compressed in an unknown way.
UNREADABLE = (OSError, EOFError, KeyError, ValueError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)
EXPECTED = "starts, tokens and gains, as medusa-train writes them"
ANSWER_WEIGHT = 3  # a pair in an answer counts as so many in a prompt: answers are what is drafted
MOST, FEWEST = 32, 2  # followers of a token that are kept, and counts of a pair
SMOOTHING = 3.0  # counts that a token has of no follower in particular
FLOOR = 3e-5  # probability of a pair that was not counted
PAIR_WEIGHT, RANK_WEIGHT = 0.6, 1.5  # of the logarithms of a pair's probability and of a rank
FACTORS = (
    1.0,
    0.5,
    0.25,
    2.0,
    0.0,
)  # of PAIR_WEIGHT, to choose from: the better heads are, the less pairs tell beside them

Array = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Followers:
    """Which tokens follow a token, and how much that speaks for them.

    Attributes:
        starts: where the followers of each token begin in the other two; the last one is their number.  # int32 [vocab_size + 1]
        tokens: followers, one token's after the other's.  # int32 [P]
        gains: PAIR_WEIGHT, or what fits the heads, times the logarithm of a pair's probability over FLOOR; 0 for other pairs.
            # float16 [P]
    """

    starts: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]
    gains: npt.NDArray[np.float16]

    @classmethod
    def count(cls, texts: Iterable[tuple[Sequence[int], Sequence[bool]]], vocab_size: int) -> Followers:
        """Count the pairs of some conversations.

        Args:
            texts: of each its token ids and which of them are an answer's.
            vocab_size: rows of the embedding.
        """
        pairs = [np.zeros(0, dtype=np.int64)]
        for input_ids, is_answer in texts:
            ids = np.asarray(input_ids, dtype=np.int64)
            found = ids[:-1] * vocab_size + ids[1:]
            pairs += [found, np.repeat(found[np.asarray(is_answer, dtype=bool)[1:]], ANSWER_WEIGHT - 1)]
        keys, counts = np.unique(np.concatenate(pairs), return_counts=True)
        totals = np.bincount(keys // vocab_size, counts, minlength=vocab_size)
        kept = _most_frequent(keys // vocab_size, counts)
        keys, counts = keys[kept], counts[kept]
        shares = counts / (totals[keys // vocab_size] + SMOOTHING)
        return cls(
            np.searchsorted(keys // vocab_size, np.arange(vocab_size + 1)).astype(np.int32),
            (keys % vocab_size).astype(np.int32),
            (PAIR_WEIGHT * np.log1p(shares / FLOOR)).astype(np.float16),
        )

    @classmethod
    def load(cls, path: Path, vocab_size: int) -> Followers:
        """Read a file.

        Args:
            path: of the file.
            vocab_size: of the model that it is for.

        Raises:
            ConfigError: no such file, or one of another vocabulary.
        """
        try:
            with zipfile.ZipFile(path):  # otherwise numpy would take other kinds of files for what they say they are
                pass
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: np.atleast_1d(file[name]) for name in ("starts", "tokens", "gains")}
        except UNREADABLE as error:
            raise _unusable(path, "something else", EXPECTED) from error
        found = cls(**arrays)
        if found.starts.shape != (vocab_size + 1,):
            got = f"a table of {max(0, found.starts.size - 1)} tokens"
            raise _unusable(path, got, f"one of the model's {vocab_size}")
        if not found._is_sound(vocab_size):
            raise _unusable(path, "a damaged table", EXPECTED)
        return found

    def fitted(self, last: Sequence[int], candidates: Array, labels: Array) -> Followers | None:
        """The same pairs with the weight that fits some heads best, by their mean top-1 accuracy; None where all make them worse.

        Args:
            last: newest token at every position.  # [N]
            candidates: of the heads there, best first.  # [N, depth, top_k]
            labels: the tokens that came; negative: not known.  # [N, depth]
        """
        found = [self._times(factor) for factor in FACTORS]
        best = max(range(len(found)), key=lambda index: found[index]._accuracy(last, candidates, labels))
        return found[best] if FACTORS[best] else None

    def _times(self, factor: float) -> Followers:
        return Followers(self.starts, self.tokens, (self.gains * np.float32(factor)).astype(np.float16))

    def _accuracy(self, last: Sequence[int], candidates: Array, labels: Array) -> float:
        if not len(last):
            return 0.0
        first = self.order(last, candidates)[:, :, 0]
        return mean_accuracy(accuracies(np.where(labels < 0, UNKNOWN, np.where(first == labels, 0, ABSENT))))

    def save(self, path: Path) -> None:
        """Write a file that :meth:`load` reads."""
        np.savez(path, starts=self.starts, tokens=self.tokens, gains=self.gains)

    def order(self, last: Sequence[int], candidates: Array) -> Array:
        """The heads' candidates, those first that often follow what stands before them.

        Before a first head's candidates stands the newest token, before a later head's the best candidate of the one before.

        Args:
            last: newest token of every sequence.  # [active]
            candidates: best first.  # [active, depth, top_k]

        Returns:
            The same candidates of every head in a new order.  # [active, depth, top_k]
        """
        return np.array(
            [self._order(token, levels) for token, levels in zip(last, candidates.tolist(), strict=True)],
            dtype=np.int64,
        )

    def _order(self, token: int, levels: Sequence[Sequence[int]]) -> list[list[int]]:
        ordered = []
        for level in levels:
            start, end = self.starts[token : token + 2].tolist()
            gains = dict(zip(self.tokens[start:end].tolist(), self.gains[start:end].tolist(), strict=True))
            scores = [gains.get(found, 0.0) - cost for found, cost in zip(level, _rank_costs(len(level)), strict=True)]
            places = sorted(range(len(level)), key=scores.__getitem__, reverse=True)
            ordered.append([level[place] for place in places])
            token = ordered[-1][0]
        return ordered

    def _is_sound(self, vocab_size: int) -> bool:
        if (self.starts.dtype, self.tokens.dtype, self.gains.dtype) != (np.int32, np.int32, np.float16):
            return False
        if not self.tokens.shape == self.gains.shape == (int(self.starts[-1]),):
            return False
        if self.starts[0] != 0 or (np.diff(self.starts) < 0).any():
            return False
        in_vocabulary = ((self.tokens >= 0) & (self.tokens < vocab_size)).all()
        return bool(in_vocabulary and np.isfinite(self.gains).all() and (self.gains >= 0).all())


def _most_frequent(tokens: Array, counts: Array) -> Array:
    """Numbers of the pairs that are kept, in their order.

    Args:
        tokens: first token of every pair, in rising order.  # [P]
        counts: of the pairs.  # [P]
    """
    order = np.lexsort((-counts, tokens))
    place = np.arange(len(order)) - np.searchsorted(tokens, tokens)  # among those of the same token
    return np.sort(order[(place < MOST) & (counts[order] >= FEWEST)])


@cache
def _rank_costs(count: int) -> Sequence[float]:
    """What speaks against every rank."""
    return [RANK_WEIGHT * math.log(rank) for rank in range(1, count + 1)]


def _unusable(path: Path, got: str, expected: str) -> ConfigError:
    return ConfigError(str(path), got, expected, "train the heads again, or leave the file out")
