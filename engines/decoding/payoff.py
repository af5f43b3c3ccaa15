"""What a step's drafts are worth: expected tokens, from how often such drafts came true, elsewhere and in this very text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from medusa_export.engines.decoding.lookup import Match, TextLookup
from medusa_export.engines.decoding.protocols import FirstDrafts

# On SmolLM2-135M's own answers to 52 of Spec-Bench's questions: how often the first draft behind a match was right, and the
# next ones if those before them were.
FIRST: Mapping[int, float] = {2: 0.45, 3: 0.62, 4: 0.82}
NEXT: Mapping[int, float] = {2: 0.64, 3: 0.72, 4: 0.86}
HEADS_BESIDE = 0.9  # how often heads are right where the text is wrong, to how often they are right at all
STRENGTH = 4.0  # expected successes that the prior weighs
DECAY = 0.95  # a success counts so much less one observation later: texts change
MOST = 0.97  # no draft is surer than this


class Rate:
    """How often something came true in this text, to how often it was expected to."""

    def __init__(self) -> None:
        self._seen = self._expected = 0.0

    @property
    def factor(self) -> float:
        """1 while nothing has been seen."""
        return (self._seen + STRENGTH) / (self._expected + STRENGTH)

    def see(self, *, came_true: bool, expected: float) -> None:
        """One observation more; ``expected`` is its probability by the prior."""
        self._seen = self._seen * DECAY + came_true
        self._expected = self._expected * DECAY + expected


@dataclass
class DraftedText:
    """A sequence as drafters see it: its text, their guesses for the next step, and how earlier ones fared.

    Attributes:
        lookup: the text and its index.
        match: where its end stood before.
        chain: what followed there.
        candidates: first tokens of the heads' tree in the step at hand, and how often one of them was expected to be right.
        first_drafts: what became of them so far.
    """

    lookup: TextLookup
    match: Match | None = None
    chain: list[int] = field(default_factory=list)
    candidates: Sequence[int] = ()
    head_share: float = 0.0
    first: Rate = field(default_factory=Rate)
    following: Rate = field(default_factory=Rate)
    heads: Rate = field(default_factory=Rate)
    first_drafts: FirstDrafts = field(default_factory=FirstDrafts)

    @property
    def last(self) -> int:
        """The newest token, which no cache holds yet."""
        return self.lookup.tokens[-1]

    def guess(self, count: int) -> None:
        """Look for up to ``count`` drafts in the text."""
        self.candidates = ()
        self.match = self.lookup.match()
        self.chain = self.lookup.draft(self.match, count) if self.match else []

    def extend(self, tokens: Sequence[int]) -> None:
        """New tokens; guesses are judged by them, whether a step verified them or not."""
        if self.match:
            length = self.match.length
            right = self.chain[0] == tokens[0]
            self.first.see(came_true=right, expected=FIRST[length])
            for guessed, token in zip(self.chain[1:], tokens[1:], strict=False):
                if not right:
                    break
                right = guessed == token
                self.following.see(came_true=right, expected=NEXT[length])
        if self.candidates:
            came_true = tokens[0] in self.candidates
            self.heads.see(came_true=came_true, expected=self.head_share)
            self.first_drafts.see(came_true=came_true, expected=self.head_share)
        self.lookup.extend(tokens)

    def chain_shares(self, count: int) -> list[float]:
        """Expected accepted tokens of chains of 0, 1, ... ``count`` tokens."""
        if not self.match:
            return [0.0] * (count + 1)
        length = self.match.length
        share = min(MOST, FIRST[length] * self.first.factor)
        following = min(MOST, NEXT[length] * self.following.factor)
        total, shares = 0.0, [0.0]
        for _ in range(count):
            total += share
            share *= following
            shares.append(total)
        return shares


class StepWorth:
    """Tokens that a step is expected to yield, over all of its sequences.

    Linear in the heads' share, so that what depends on a sequence is summed once a step and not once for every shape.

    Args:
        sequences: that take the step.
        longest: tokens of the longest chain that is asked for.
    """

    def __init__(self, sequences: Sequence[DraftedText], longest: int) -> None:
        shares = [sequence.chain_shares(longest) for sequence in sequences]
        factors = [sequence.heads.factor for sequence in sequences]
        self._chains = [len(sequences) + sum(column) for column in zip(*shares, strict=True)]
        beside = sum(factor * (1 - HEADS_BESIDE * share[1]) for share, factor in zip(shares, factors, strict=True))
        self._heads = sum(factors), beside

    def tokens(self, chain: int, heads: float) -> float:
        """Of a step that verifies so many tokens of the text, and nodes of the heads.

        Args:
            chain: tokens of the text.
            heads: accepted tokens that the heads' nodes yield on average, wherever they are.
        """
        return self._chains[chain] + self._heads[chain > 0] * heads
