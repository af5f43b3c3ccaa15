"""What chooses the tokens of one answer: rules that change the logits, then the best token or a drawn one.

A chooser is asked once a token, in the order of the text, whatever was drafted: ``accept_drawn`` asks it behind accepted nodes only.
So its rules see the same text with a tree as without one, and both give the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from medusa_export.core.errors import MedusaExportError
from medusa_export.heads.decoding.sampling import Sampler, Sampling

Scores = npt.NDArray[np.float32]  # [vocab_size]


class TokenRule(Protocol):
    """Changes the logits of the next token, knowing those that were chosen before."""

    def apply(self, scores: Scores) -> None:
        """Change the logits in place; -inf for a token that must not come.  # [vocab_size]"""

    def take(self, token: int) -> None:
        """A token was chosen."""


@dataclass(frozen=True)
class TokenLogprob:
    """How likely the model itself found a token, before any rule and at temperature 1.

    Attributes:
        top: the likeliest tokens there and their log-probabilities, the likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class TokenChooser:
    """Chooses the tokens of one answer.

    Args:
        rules: applied in this order.
        sampler: draws the token; None takes the best one.
        top_logprobs: see :class:`~medusa_export.heads.decoding.sampling.Sampling`.

    Attributes:
        logprobs: one for each token that was chosen, where they are wanted. A step may choose more tokens than the answer takes.
        error: what a rule failed with; the tokens from then on mean nothing.
    """

    def __init__(
        self, rules: Sequence[TokenRule] = (), sampler: Sampler | None = None, top_logprobs: int | None = None
    ) -> None:
        self.rules, self._sampler, self._top = rules, sampler, top_logprobs
        self.logprobs: list[TokenLogprob] = []
        self.error: MedusaExportError | None = None

    def draw(self, logits: npt.NDArray[Any]) -> int:
        """The next token.  # [vocab_size]"""
        scores = logits
        if self.rules and self.error is None:
            scores = logits.astype(np.float32)  # a copy
            try:
                for rule in self.rules:
                    rule.apply(scores)
            except MedusaExportError as error:  # one answer's: others in the same step go on
                self.error = error
        token = self._sampler.draw(scores) if self._sampler else int(scores.argmax())
        try:
            for rule in self.rules if self.error is None else ():
                rule.take(token)
        except MedusaExportError as error:
            self.error = error
        if self._top is not None:
            self.logprobs.append(token_logprob(logits, token, self._top))
        return token


def token_chooser(
    sampling: Sampling, input_ids: Sequence[int], eos_token_ids: Iterable[int], grammar: TokenRule | None = None
) -> TokenChooser | None:
    """The chooser of a request; None where the best token of the logits as they are is all that is asked for.

    Args:
        input_ids: the prompt.  # [S]
        grammar: a rule that only permits tokens; it comes behind all that weigh them.
    """
    rules: list[TokenRule] = []
    if sampling.logit_bias:
        rules.append(LogitBias(sampling.logit_bias))
    if sampling.min_tokens:
        rules.append(MinTokens(sampling.min_tokens, eos_token_ids))
    if (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) != (0, 0, 1):
        rules.append(Penalties(sampling, input_ids))
    if grammar is not None:
        rules.append(grammar)
    sampler = None
    if sampling.temperature:
        sampler = Sampler(sampling.temperature, sampling.seed, sampling.top_p)
        if sampling.top_k or sampling.min_p:
            rules.append(Shortlist(sampling.top_k, sampling.min_p, sampling.temperature))
    if not rules and sampler is None and sampling.logprobs is None:
        return None
    return TokenChooser(rules, sampler, sampling.logprobs)


class LogitBias:
    """Adds a number to the logits of some tokens."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._tokens, self._values = list(bias), np.array(list(bias.values()), np.float32)

    def apply(self, scores: Scores) -> None:
        scores[self._tokens] += self._values

    def take(self, token: int) -> None:
        """Nothing to remember."""


class MinTokens:
    """Keeps an answer from ending early."""

    def __init__(self, least: int, eos_token_ids: Iterable[int]) -> None:
        self._left, self._eos = least, list(eos_token_ids)

    def apply(self, scores: Scores) -> None:
        if self._left > 0:
            scores[self._eos] = -np.inf

    def take(self, token: int) -> None:
        self._left -= 1


class Penalties:
    """Makes tokens that were there before less likely: OpenAI's two on the answer, CTRL's (arXiv 1909.05858) on all text."""

    def __init__(self, sampling: Sampling, input_ids: Sequence[int]) -> None:
        self._sampling = sampling
        self._seen = set(input_ids)
        self._counts: dict[int, int] = {}  # in the answer

    def apply(self, scores: Scores) -> None:
        if self._sampling.repetition_penalty != 1:
            tokens = list(self._seen)
            found, factor = scores[tokens], np.float32(self._sampling.repetition_penalty)
            scores[tokens] = np.where(found > 0, found / factor, found * factor)
        if self._counts:
            tokens, counts = list(self._counts), np.array(list(self._counts.values()), np.float32)
            scores[tokens] -= self._sampling.frequency_penalty * counts + self._sampling.presence_penalty

    def take(self, token: int) -> None:
        self._seen.add(token)
        self._counts[token] = self._counts.get(token, 0) + 1


class Shortlist:
    """Keeps the likeliest tokens: the best ``top_k``, and those with at least ``min_p`` of the best one's probability."""

    def __init__(self, top_k: int, min_p: float, temperature: float) -> None:
        self._top_k, self._min_p, self._temperature = top_k, min_p, temperature

    def apply(self, scores: Scores) -> None:
        if 0 < self._top_k < len(scores):
            least = np.partition(scores, -self._top_k)[-self._top_k]
            scores[scores < least] = -np.inf
        if self._min_p:
            scores[scores < scores.max() + self._temperature * np.log(self._min_p)] = -np.inf

    def take(self, token: int) -> None:
        """Nothing to remember."""


def token_logprob(logits: npt.NDArray[Any], token: int, top: int) -> TokenLogprob:
    """The log-probabilities of a token and of the ``top`` likeliest ones.  # [vocab_size]

    Args:
        logits: before any rule.  # [vocab_size]
        token: id of the token that was chosen.
        top: how many of the likeliest to list; at most vocab_size are.
    """
    scaled = logits.astype(np.float64)
    scaled -= scaled.max()
    shares = scaled - np.log(np.exp(scaled).sum())
    size = min(top, len(shares))
    best = np.argpartition(-shares, size - 1)[:size] if size else np.empty(0, np.int64)
    best = best[np.argsort(-shares[best], kind="stable")]
    return TokenLogprob(token, float(shares[token]), tuple((int(at), float(shares[at])) for at in best))
