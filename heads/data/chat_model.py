"""What answers a chat: an engine in this process or a server elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from medusa_export.core.errors import ConfigError, MedusaExportError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the best token.
        top_p: tokens are drawn from the smallest set with this probability.
        max_tokens: tokens of an answer, at most; a longer one is cut.
        seed: of the draws; None for another one every time.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int | None = None

    def __post_init__(self) -> None:
        rules = {
            "temperature": (math.isfinite(self.temperature) and self.temperature >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "seed": (self.seed is None or self.seed >= 0, "0 or more"),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise ConfigError(name, f"{getattr(self, name)}", expected, "change it")


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        finish_reason: "stop" where the model ended it; "length" where it was cut.
        completion_tokens: tokens that were generated, the one that ends the answer included where the model counts it.
    """

    text: str
    finish_reason: str
    completion_tokens: int


class ChatModel(Protocol):
    """Answers conversations, many at a time.

    Attributes:
        name: what the answers are recorded as coming from.
    """

    name: str

    async def answer(self, messages: Sequence[Mapping[str, str]], sampling: Sampling) -> Answer:
        """The model's next turn.

        Args:
            messages: ``{"role", "content"}``, the last of them the user's.

        Raises:
            ModelUnavailableError: no conversation can be answered.
            MedusaExportError: this one cannot.
        """

    async def close(self) -> None:
        """Let go of connections, threads and memory."""


ModelFactory = Callable[[], ChatModel]  # one that pickles, where other processes open the model


class AnswerError(MedusaExportError):
    """A conversation that the model does not answer; others may fare better."""


class ModelUnavailableError(MedusaExportError):
    """A model that answers nothing: it is not there, refuses the caller, or keeps failing."""
