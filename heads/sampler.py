"""Tokens drawn from a model's distribution, one random number a token, so that the same seed gives the same text."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from medusa_export.heads.errors import ConfigError

Logits = npt.NDArray[Any]  # [vocab_size]


class Sampler:
    """Draws the tokens of one text.

    Args:
        temperature: what logits are divided by, above 0.
        seed: of the random numbers.

    Raises:
        ConfigError: a temperature that is not above 0.
    """

    def __init__(self, temperature: float, seed: int | tuple[int, ...] = 0) -> None:
        if not 0 < temperature < float("inf"):
            raise ConfigError(
                "--temperature", f"{temperature:g}", "a number above 0", "leave it out to decode greedily"
            )
        self.temperature, self.seed = temperature, seed
        self._chance = np.random.default_rng(seed)

    def draw(self, logits: Logits) -> int:
        """The token in whose share of the distribution the next random number falls."""
        shares = self._cumulative(logits)
        return int(np.searchsorted(shares, self._chance.random() * shares[-1], side="right"))

    def margin(self, position: int, logits: Logits, token: int) -> float:
        """How many logits would have to move for the text's token at ``position`` to be ``token``; 0 where it is.

        A share of the distribution is the logistic function of a difference of logits over the temperature, whose slope is at most
        1/4: a random number at a distance d from a token's share is 4 * temperature * d logits away from it at least.
        """
        shares = self._cumulative(logits)
        number = np.random.default_rng(self.seed).random(position + 1)[-1]
        low, high = (0.0 if token == 0 else shares[token - 1] / shares[-1]), shares[token] / shares[-1]
        return 4 * self.temperature * float(max(low - number, number - high, 0.0))

    def _cumulative(self, logits: Logits) -> npt.NDArray[np.float64]:
        scaled = logits.astype(np.float64) / self.temperature
        return np.cumsum(np.exp(scaled - scaled.max()))
