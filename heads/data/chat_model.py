"""What answers a chat: an engine in this process or a server elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from medusa_export.core.errors import MedusaExportError
from medusa_export.heads.decoding.sampling import Sampling


@dataclass(frozen=True)
class ChatAnswer:
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

    async def answer(self, messages: Sequence[Mapping[str, str]], sampling: Sampling) -> ChatAnswer:
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
