"""A request on its way through the scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from medusa_export.core.errors import ConfigError, MedusaExportError
from medusa_export.heads.decoding.sampling import Sampling
from medusa_export.heads.decoding.token_choice import TokenChooser


class PromptError(ConfigError):
    """A prompt that leaves no room for an answer.

    By the first sentence clients tell this error from others: litellm by its words, which are OpenAI's, langchain by the code.

    Args:
        tokens: that it has.
        context: tokens of prompt and answer, at most.
    """

    def __init__(self, where: str, tokens: int, context: int) -> None:
        self.tokens, self.context = tokens, context
        super().__init__(where, f"{tokens} tokens", f"1 .. {context - 1}", "shorten it, or allow longer sequences")

    def __str__(self) -> str:
        said = f"This model's maximum context length is {self.context} tokens, and the prompt has {self.tokens}"
        return f"{said} (context_length_exceeded). {super().__str__()}"


class BusyError(MedusaExportError):
    """A full queue: the same request may be taken a moment later."""


class ClosedError(MedusaExportError):
    """A server that is stopping."""


@dataclass(frozen=True)
class Phases:
    """Seconds that a request spent in each part of its way; 0 where it did not come so far.

    Attributes:
        queue: until its prompt was begun.
        prefill: from there to its first token, steps of others in between.
        decode: from there to its last token.
    """

    queue: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class FinishInfo:
    """How a request ended.

    Attributes:
        reason: "stop" (end of sequence, or the callbacks wanted no more), "length" (max_tokens, or no room), "cancelled", "timeout",
            "closed" or "error".
        steps: of decoding; the first token comes from the prompt.
        seconds: since it was submitted.
        error: what befell it, where the reason is "error".
        phases: of these seconds.
    """

    reason: str
    prompt_tokens: int
    completion_tokens: int
    steps: int
    seconds: float
    error: BaseException | None = None
    phases: Phases = field(default_factory=Phases)

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a decoding step yielded on average; 0 without steps."""
        return (self.completion_tokens - 1) / self.steps if self.steps else 0.0


class TokenCallbacks(Protocol):
    """What hears of one request, in the scheduler's thread: it must not block."""

    def take(self, token: int) -> bool:
        """The next token; False: it is the last one that is wanted."""

    def flush(self) -> None:
        """The tokens of a step are all there."""

    def end(self, end: FinishInfo) -> None:
        """Nothing more comes. Called once for every request that was submitted."""


@dataclass
class RequestHandle:
    """One request; what :meth:`Scheduler.submit` returns."""

    input_ids: Sequence[int]
    sampling: Sampling
    callbacks: TokenCallbacks
    chooser: TokenChooser | None
    submitted: float
    deadline: float
    tokens: list[int] = field(default_factory=list)
    drafted: Any = None  # its text, as the drafter sees it
    steps: int = 0
    begun_at: float = 0.0  # its prompt; as the next two, 0 before
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    is_cancelled: bool = False

    def cancel(self) -> None:
        """End it before the next step; from any thread."""
        self.is_cancelled = True

    @property
    def phases(self) -> Phases:
        """Where its time went so far."""
        if not self.first_token_at:
            return Phases(max(self.begun_at - self.submitted, 0.0))
        prefill, decode = self.first_token_at - self.begun_at, self.last_token_at - self.first_token_at
        return Phases(self.begun_at - self.submitted, prefill, decode)
