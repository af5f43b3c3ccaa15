"""Answers as OpenAI's protocol words them, whole or in chunks, with what drafts were worth in a field of their own."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from medusa_export.engines.serving.openai.protocol.asked import Asked
from medusa_export.engines.serving.openai.protocol.errors import require_answer
from medusa_export.engines.serving.openai.protocol.tools import ToolParser
from medusa_export.engines.serving.request import FinishInfo
from medusa_export.engines.serving.text_service import Piece
from medusa_export.heads.decoding.token_choice import TokenLogprob

PlacedLogprob = tuple[int, TokenLogprob]  # characters before the token
DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Shape:
    """What the bodies of an endpoint are called.

    Attributes:
        is_chat: a conversation's next message, or text that goes on.
    """

    id_prefix: str
    whole: str
    chunk: str
    is_chat: bool


CHAT_SHAPE = Shape("chatcmpl-", "chat.completion", "chat.completion.chunk", is_chat=True)
TEXT_SHAPE = Shape("cmpl-", "text_completion", "text_completion", is_chat=False)


class TokenSpelling(Protocol):
    """Spells the tokens of a model, as :class:`~medusa_export.engines.serving.text_service.TextService` does."""

    def token_text(self, token: int) -> str:
        """A name for people, another one for each token of a text."""

    def token_bytes(self, token: int) -> bytes:
        """What it adds to a text."""


@dataclass
class AnswerChoice:
    """One choice of an answer as it comes.

    Attributes:
        parser: finds the calls of tools in it.
        text, calls, logprobs: what was said so far.
        waiting: log-probabilities whose text has not come, and the offsets of their tokens.
        told: characters that came, calls too.
        prompt_tokens: of its prompt.
    """

    parser: ToolParser | None = None
    text: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[PlacedLogprob] = field(default_factory=list)
    waiting: list[PlacedLogprob] = field(default_factory=list)
    tokens: int = 0
    told: int = 0
    prompt_tokens: int = 0
    end: FinishInfo | None = None

    def feed(self, piece: Piece) -> tuple[str, list[dict[str, Any]], list[PlacedLogprob]]:
        """New text, new calls, and the log-probabilities of tokens whose text has come."""
        said, calls = piece.text, list[dict[str, Any]]()
        if self.parser is not None:
            said, calls = self.parser.feed(said, is_last=piece.end is not None)
        self.text += said
        self.calls += calls
        self.tokens += len(piece.token_ids)
        self.end = piece.end
        placed = self._placed(piece)
        self.logprobs += placed
        return said, calls, placed

    def _placed(self, piece: Piece) -> list[PlacedLogprob]:
        """Where a stop word cuts the text, the log-probabilities end with it."""
        self.told += len(piece.text)
        self.waiting += zip(
            piece.offsets, piece.logprobs, strict=False
        )  # no log-probabilities where none were asked for
        goes_on = piece.end is None or piece.is_cut
        count = sum(offset < self.told for offset, _ in self.waiting) if goes_on else len(self.waiting)
        placed, self.waiting = self.waiting[:count], self.waiting[count:]
        return placed

    @property
    def reason(self) -> str | None:
        """Why it ended, in the protocol's words; None while it goes on."""
        if self.end is None:
            return None
        return "tool_calls" if self.calls and self.end.reason == "stop" else self.end.reason


class Writer:
    """Writes the bodies of one answer.

    Args:
        model: its name, as the client knows it.
        tokens: spells them, for log-probabilities.
        prompts: of each choice, where answers begin with them.
        prompt_tokens: of each choice, as far as they are known before its end.
    """

    def __init__(
        self, shape: Shape, model: str, asked: Asked, tokens: TokenSpelling, prompts: Iterable[str] = (),
        prompt_tokens: Iterable[int] = (),
    ) -> None:  # fmt: skip
        self._shape, self._model, self._asked, self._tokens = shape, model, asked, tokens
        self._prompts = list(prompts)
        self._choices = [AnswerChoice(ToolParser() if asked.calls_tools else None) for _ in asked.requests]
        self._id, self._created = f"{shape.id_prefix}{secrets.token_hex(12)}", int(time.time())
        for choice, count in zip(self._choices, prompt_tokens, strict=False):
            choice.prompt_tokens = count

    @property
    def finish_reasons(self) -> list[str | None]:
        """Why each choice ended."""
        return [choice.reason for choice in self._choices]

    def take(self, index: int, piece: Piece) -> None:
        """A piece of an answer that is told whole.

        Raises:
            UnfinishedError: it ended without an answer.
        """
        require_answer(piece.end)
        self._choices[index].feed(piece)

    def whole(self) -> dict[str, Any]:
        """The body of an answer in one piece, when all of it was taken."""
        choices = []
        for index, choice in enumerate(self._choices):
            text = self._echo(index) + choice.text
            said: dict[str, Any] = {"text": text}
            if self._shape.is_chat:
                message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
                if choice.calls:
                    calls = [{key: call[key] for key in ("id", "type", "function")} for call in choice.calls]
                    message = {**message, "content": text or None, "tool_calls": calls}
                said = {"message": message}
            choices.append(self._choice(index, said, choice.logprobs, choice.reason))
        return {**self._body(self._shape.whole, choices), "usage": self.usage(), "medusa": self.acceptance()}

    def first(self) -> str:
        """The events before all text: who speaks, or the prompts."""
        if not self._shape.is_chat:
            return "".join(self._event(index, {"text": text}) for index, text in enumerate(self._prompts) if text)
        return "".join(self._event(index, {"role": "assistant", "content": ""}) for index in range(len(self._choices)))

    def piece(self, index: int, piece: Piece) -> str:
        """The events of a piece of an answer; the last one of all is followed by what is known then.

        Raises:
            UnfinishedError: it ended without an answer.
        """
        require_answer(piece.end)
        choice = self._choices[index]
        said, calls, logprobs = choice.feed(piece)
        events = ""
        if said or calls or logprobs:
            delta: dict[str, Any] = {"content": said} if self._shape.is_chat else {"text": said}
            events = self._event(index, {**delta, **({"tool_calls": calls} if calls else {})}, logprobs)
        if piece.end is None:
            return events
        is_last = all(choice.end for choice in self._choices)
        more = {"medusa": self.acceptance()} if is_last else {}
        closing = self._event(index, {} if self._shape.is_chat else {"text": ""}, (), choice.reason, more)
        return events + closing + (self._closing() if is_last else "")

    def usage(self) -> dict[str, int]:
        """Tokens in and out; a prompt counts once, however many choices it has."""
        known = [choice.end.prompt_tokens if choice.end else choice.prompt_tokens for choice in self._choices]
        count = self._asked.per_prompt
        prompt = sum(max(known[at : at + count]) for at in range(0, len(known), count))
        ended = [choice.end.completion_tokens if choice.end else choice.tokens for choice in self._choices]
        return {"prompt_tokens": prompt, "completion_tokens": sum(ended), "total_tokens": prompt + sum(ended)}

    def acceptance(self) -> dict[str, float]:
        """What drafts were worth in all choices."""
        return acceptance([choice.end for choice in self._choices if choice.end])

    def _closing(self) -> str:
        if not self._asked.stream_options.usage:
            return DONE
        return event({**self._body(self._shape.chunk, []), "usage": self.usage()}) + DONE

    def _echo(self, index: int) -> str:
        return self._prompts[index] if self._prompts else ""

    def _event(
        self, index: int, said: dict[str, Any], logprobs: Iterable[PlacedLogprob] = (), reason: str | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> str:  # fmt: skip
        options = self._asked.stream_options
        choice = self._choice(index, {"delta": said} if self._shape.is_chat else said, list(logprobs), reason)
        empty = {"usage": None} if options.usage else {}
        running = {"usage": self.usage()} if options.running_usage else {}
        return event({**self._body(self._shape.chunk, [choice]), **empty, **running, **(more or {})})

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    def _choice(
        self, index: int, said: dict[str, Any], logprobs: list[PlacedLogprob], reason: str | None
    ) -> dict[str, Any]:
        words = self._chat_logprobs if self._shape.is_chat else self._text_logprobs
        told = words(logprobs) if logprobs else None
        return {"index": index, **said, "logprobs": told, "finish_reason": reason}

    def _chat_logprobs(self, logprobs: list[PlacedLogprob]) -> dict[str, Any]:
        def told(token: int, logprob: float) -> dict[str, Any]:
            text, spelled = self._tokens.token_text(token), self._tokens.token_bytes(token)
            return {"token": text, "logprob": logprob, "bytes": list(spelled)}

        return {
            "content": [
                {**told(one.token, one.logprob), "top_logprobs": [told(*other) for other in one.top]}
                for _, one in logprobs
            ],
            "refusal": None,
        }

    def _text_logprobs(self, logprobs: list[PlacedLogprob]) -> dict[str, Any]:
        name, found = self._tokens.token_text, [one for _, one in logprobs]
        wants_top = any(request.sampling.logprobs for request in self._asked.requests)
        return {
            "tokens": [name(one.token) for one in found], "token_logprobs": [one.logprob for one in found],
            "text_offset": [offset for offset, _ in logprobs],
            "top_logprobs": [{name(token): value for token, value in one.top} for one in found] if wants_top else None,
        }  # fmt: skip


def event(body: Mapping[str, Any]) -> str:
    """A server-sent event; JSON has no line breaks of its own."""
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


def acceptance(ends: list[FinishInfo]) -> dict[str, float]:
    """What drafts were worth: the first token comes from the prompt, and every step gives one that is no draft."""
    steps = sum(end.steps for end in ends)
    decoded = sum(max(end.completion_tokens - 1, 0) for end in ends)
    per_step = round(decoded / steps, 4) if steps else 0.0
    return {"steps": steps, "accepted_draft_tokens": max(decoded - steps, 0), "tokens_per_step": per_step}
