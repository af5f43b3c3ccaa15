"""Tokens drawn from a model's distribution, one random number a token, so that the same seed gives the same text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from medusa_export.core.errors import ConfigError
from medusa_export.core.flags import COUNT, NUMBER, Bounds, flag, flags_of

Logits = npt.NDArray[Any]  # [vocab_size]

PANEL = "Sampling"  # heading of --help
_SORTED = 1024  # tokens that are sorted at first: a whole vocabulary takes milliseconds


class Sampler:
    """Draws the tokens of one text.

    Args:
        temperature: what logits are divided by, above 0.
        seed: of the random numbers; None for others every time.
        top_p: tokens are drawn from the smallest set with this probability.

    Raises:
        ConfigError: a temperature that is not above 0.
    """

    def __init__(self, temperature: float, seed: int | tuple[int, ...] | None = 0, top_p: float = 1.0) -> None:
        if not 0 < temperature < float("inf"):
            raise ConfigError(
                "--temperature", f"{temperature:g}", "a finite number above 0, or 0 for greedy decoding", "change it"
            )
        if not 0 < top_p <= 1:
            raise ConfigError("top_p", f"{top_p:g}", "more than 0 and at most 1", "change it")
        self.temperature, self.seed, self.top_p = temperature, seed, top_p
        self._rng = np.random.default_rng(seed)

    def draw(self, logits: Logits) -> int:
        """The token in whose share of the distribution the next random number falls."""
        if self.top_p < 1:
            tokens, shares = self._nucleus(logits)
            return int(tokens[np.searchsorted(shares, self._rng.random() * shares[-1], side="right")])
        shares = self._cumulative(logits)
        return int(np.searchsorted(shares, self._rng.random() * shares[-1], side="right"))

    def margin(self, position: int, logits: Logits, token: int) -> float:
        """How many logits would have to move for the text's token at ``position`` to be ``token``; 0 where it is.

        A share of the distribution is the logistic function of a difference of logits over the temperature, whose slope is at most
        1/4: a random number at a distance d from a token's share is 4 * temperature * d logits away from it at least. With ``top_p``
        the set that tokens are drawn from may change by a token too, which takes as much for its probability.

        Args:
            position: of the token in the answer, from 0.
            logits: of its place.  # [vocab_size]
            token: id of the other token.
        """
        number = np.random.default_rng(self.seed).random(position + 1)[-1]
        weights = self._weights(logits)
        if self.top_p == 1:
            return self._distance(np.arange(len(weights)), weights, number, token)
        found = [
            max(change, self._distance(np.sort(kept), weights, number, token))
            for change, kept in self._nuclei(logits, weights)
            if token in kept
        ]
        return min(found, default=float("inf"))

    def _distance(
        self, kept: npt.NDArray[np.int64], weights: npt.NDArray[np.float64], number: float, token: int
    ) -> float:
        """From the random number to a token's share among the ``kept`` ones, in logits."""
        shares = np.cumsum(weights[kept])
        at = int(np.searchsorted(kept, token))
        low, high = (0.0 if at == 0 else shares[at - 1] / shares[-1]), shares[at] / shares[-1]
        return 4 * self.temperature * float(max(low - number, number - high, 0.0))

    def _nuclei(self, logits: Logits, weights: npt.NDArray[np.float64]) -> list[tuple[float, npt.NDArray[np.int64]]]:
        """The set that tokens are drawn from, and those with one token less, more, or another, with the logits that takes."""
        order = np.argsort(-weights, kind="stable")
        reached = np.cumsum(weights[order]) / weights.sum()
        size = 1 + int(np.searchsorted(reached, self.top_p))
        found = [(0.0, order[:size])]
        if size > 1:
            found.append((4 * self.temperature * abs(float(reached[size - 2]) - self.top_p), order[: size - 1]))
        if size < len(order):
            found.append((4 * self.temperature * abs(float(reached[size - 1]) - self.top_p), order[: size + 1]))
            gap = float(logits[order[size - 1]]) - float(logits[order[size]])
            found.append((gap, np.delete(order[: size + 1], size - 1)))
        return found

    def _nucleus(self, logits: Logits) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """The most likely tokens, as few as together reach ``top_p``, in the vocabulary's order, and their cumulative weights."""
        weights = self._weights(logits)
        needed = self.top_p * weights.sum()
        best = np.argpartition(-weights, _SORTED)[:_SORTED] if len(weights) > _SORTED else np.empty(0, np.int64)
        if weights[best].sum() <= needed:  # too flat for a few to suffice
            best = np.arange(len(weights))
        order = best[np.argsort(-weights[best], kind="stable")]
        kept = np.sort(order[: 1 + int(np.searchsorted(np.cumsum(weights[order]), needed))])
        return kept, np.cumsum(weights[kept])

    def _cumulative(self, logits: Logits) -> npt.NDArray[np.float64]:
        return np.cumsum(self._weights(logits))

    def _weights(self, logits: Logits) -> npt.NDArray[np.float64]:
        """In proportion to the probabilities."""
        scaled = logits.astype(np.float64) / self.temperature
        weights: npt.NDArray[np.float64] = np.exp(scaled - scaled.max())
        return weights


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_tokens: a longer answer is cut.
        top_k: draw from the K likeliest tokens; 0: from all.
        min_p: tokens less likely than this part of the likeliest one's probability are never drawn.
        presence_penalty, frequency_penalty: taken from the logits of a token that the answer has, once or each time it does.
        repetition_penalty: what the logits of a token that prompt or answer have are divided by, or multiplied with below 0.
        logit_bias: added to the logits of a token.
        min_tokens: no end of sequence before this many tokens.
        ignore_eos: the end of sequence does not end the answer.
        logprobs: how many of the likeliest tokens to report beside each token, with log-probabilities; None: report none.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = flag(
        0.0, help="Temperature; 0: take the best token, as greedy decoding does.", panel=PANEL, bounds=COUNT
    )
    top_p: float = flag(
        1.0,
        help="Draw from the smallest set of tokens with this probability.",
        panel=PANEL,
        bounds=Bounds(above=0, most=1),
    )
    max_tokens: int = flag(
        256,
        help="Maximum tokens of an answer; longer ones are cut off and not used for training by default.",
        panel=PANEL,
        bounds=NUMBER,
    )
    seed: int | None = flag(
        None, help="Seed for the draws.", panel=PANEL, default="a different one every time", bounds=COUNT
    )
    # What servers are asked for; no flags.
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None

    def recorded(self) -> dict[str, Any]:
        """What rows of data keep and servers are asked for: the flags, and of the others those that are not at their defaults."""
        plain, flags = Sampling(), {item.field for item in flags_of(Sampling)}
        return {name: value for name, value in asdict(self).items() if name in flags or value != getattr(plain, name)}

    def __post_init__(self) -> None:
        rules = {
            "temperature": (math.isfinite(self.temperature) and self.temperature >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "seed": (self.seed is None or self.seed >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "min_p": (0 <= self.min_p <= 1, "0 .. 1"),
            "presence_penalty": (math.isfinite(self.presence_penalty), "a finite number"),
            "frequency_penalty": (math.isfinite(self.frequency_penalty), "a finite number"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "a number above 0"),
            "logit_bias": (all(math.isfinite(bias) for bias in self.logit_bias.values()), "finite numbers"),
            "min_tokens": (0 <= self.min_tokens <= self.max_tokens, "0 .. max_tokens"),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, "0 or more"),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise ConfigError(name, f"{getattr(self, name)}", expected, "change it")
