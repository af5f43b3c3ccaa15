"""Answers as OpenAI's protocol words them, whole or in chunks, with what drafts were worth in a field of their own."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from medusa_export.core.errors import ConfigError
from medusa_export.engines.serving.request import FinishInfo
from medusa_export.engines.serving.text_service import TextRequest
from medusa_export.heads.decoding.sampling import Sampling

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


@dataclass(frozen=True)
class Writer:
    """Writes the bodies of one answer.

    Attributes:
        model: its name, as the client knows it.
        has_usage: chunks have a field ``usage``, which the last one fills.
    """

    shape: Shape
    model: str
    has_usage: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, end: FinishInfo) -> dict[str, Any]:
        """The body of an answer in one piece."""
        said: dict[str, Any] = {"text": text}
        if self.shape.is_chat:
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        body = self._body(self.shape.whole, [self._choice(said, end.reason)])
        return {**body, "usage": usage(end), "medusa": acceptance(end)}

    def first(self) -> str:
        """The event before all text; empty where the endpoint has none."""
        return self._event({"role": "assistant", "content": ""}) if self.shape.is_chat else ""

    def text(self, text: str) -> str:
        """An event with more text."""
        return self._event({"content": text} if self.shape.is_chat else {"text": text})

    def last(self, end: FinishInfo) -> str:
        """The events behind all text."""
        closing = self._event({} if self.shape.is_chat else {"text": ""}, end.reason, {"medusa": acceptance(end)})
        total = self._line({**self._body(self.shape.chunk, []), "usage": usage(end)}) if self.has_usage else ""
        return closing + total + DONE

    def _event(self, said: dict[str, Any], reason: str | None = None, more: Mapping[str, Any] | None = None) -> str:
        choice = self._choice({"delta": said} if self.shape.is_chat else said, reason)
        empty = {"usage": None} if self.has_usage else {}
        return self._line({**self._body(self.shape.chunk, [choice]), **empty, **(more or {})})

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        id_ = f"{self.shape.id_prefix}{self.id}"
        return {"id": id_, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    @staticmethod
    def _choice(said: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": reason}

    @staticmethod
    def _line(body: Mapping[str, Any]) -> str:
        return event(body)


def event(body: Mapping[str, Any]) -> str:
    """A server-sent event; JSON has no line breaks of its own."""
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


def usage(end: FinishInfo) -> dict[str, int]:
    """Tokens in and out."""
    total = end.prompt_tokens + end.completion_tokens
    return {"prompt_tokens": end.prompt_tokens, "completion_tokens": end.completion_tokens, "total_tokens": total}


def acceptance(end: FinishInfo) -> dict[str, float]:
    """What drafts were worth: the first token comes from the prompt, and every step gives one that is no draft."""
    accepted = max(end.completion_tokens - 1 - end.steps, 0)
    per_step = round(end.tokens_per_step, 4)
    return {"steps": end.steps, "accepted_draft_tokens": accepted, "tokens_per_step": per_step}


def text_request(values: Mapping[str, Any], max_tokens: int) -> TextRequest:
    """What the values of a request ask for.

    Args:
        max_tokens: where the request does not say.

    Raises:
        ConfigError: values that contradict each other, or out of range.
    """
    limits = {values[name] for name in ("max_tokens", "max_completion_tokens") if name in values}
    if len(limits) > 1:
        raise ConfigError("max_tokens", "another number than in max_completion_tokens", "one of them", "leave one out")
    if "stream_options" in values and not values.get("stream"):
        raise ConfigError("stream_options", "options without a stream", '"stream": true', "leave them out")
    seed = values.get("seed")
    sampling = Sampling(
        temperature=values.get("temperature", 0.0), top_p=values.get("top_p", 1.0), max_tokens=min(limits, default=max_tokens),
        seed=None if seed is None else seed % 2**64,
    )  # fmt: skip
    return TextRequest(values.get("messages", ()), values.get("prompt", ""), sampling, values.get("stop", ()))
