"""Answers as OpenAI's protocol words them, whole or in chunks, with what drafts were worth in a field of their own."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from medusa_export.engines.serving.openai.protocol.asked import Asked
from medusa_export.engines.serving.openai.protocol.errors import require_answer
from medusa_export.engines.serving.openai.protocol.tools import ToolParser
from medusa_export.engines.serving.request import FinishInfo
from medusa_export.engines.serving.text_service import Piece
from medusa_export.heads.decoding.token_choice import TokenLogprob

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


@dataclass
class Choice:
    """One choice of an answer as it comes.

    Attributes:
        parser: finds the calls of tools in it.
        text, calls, logprobs: what was said so far.
        told: characters, where log-probabilities have to say at which they stand.
    """

    parser: ToolParser | None = None
    text: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    tokens: int = 0
    told: int = 0
    end: FinishInfo | None = None

    def feed(self, piece: Piece) -> tuple[str, list[dict[str, Any]]]:
        """New text, and new calls."""
        said, calls = piece.text, list[dict[str, Any]]()
        if self.parser is not None:
            said, calls = self.parser.feed(said, is_last=piece.end is not None)
        self.text += said
        self.calls += calls
        self.logprobs += piece.logprobs
        self.tokens += len(piece.token_ids)
        self.end = piece.end
        return said, calls

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
        token_text: the text of a token, for log-probabilities.
        prompts: of each choice, where answers begin with them.
    """

    def __init__(
        self, shape: Shape, model: str, asked: Asked, token_text: Callable[[int], str], prompts: Iterable[str] = ()
    ) -> None:
        self._shape, self._model, self._asked, self._token_text = shape, model, asked, token_text
        self._prompts = list(prompts)
        self._choices = [Choice(ToolParser() if asked.calls_tools else None) for _ in asked.requests]
        self._id, self._created = f"{shape.id_prefix}{secrets.token_hex(12)}", int(time.time())
        self._prompt_tokens = 0  # known when the first answers end

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
        said, calls = choice.feed(piece)
        events = ""
        if said or calls or piece.logprobs:
            delta: dict[str, Any] = {"content": said} if self._shape.is_chat else {"text": said}
            events = self._event(index, {**delta, **({"tool_calls": calls} if calls else {})}, piece.logprobs)
        if piece.end is None:
            return events
        is_last = all(choice.end for choice in self._choices)
        more = {"medusa": self.acceptance()} if is_last else {}
        closing = self._event(index, {} if self._shape.is_chat else {"text": ""}, (), choice.reason, more)
        return events + closing + (self._closing() if is_last else "")

    def usage(self) -> dict[str, int]:
        """Tokens in and out; a prompt counts once, however many choices it has."""
        known = [choice.end.prompt_tokens if choice.end else 0 for choice in self._choices]
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
        self, index: int, said: dict[str, Any], logprobs: Iterable[TokenLogprob] = (), reason: str | None = None,
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
        self, index: int, said: dict[str, Any], logprobs: list[TokenLogprob], reason: str | None
    ) -> dict[str, Any]:
        words = self._chat_logprobs if self._shape.is_chat else self._text_logprobs
        told = words(index, logprobs) if logprobs else None
        return {"index": index, **said, "logprobs": told, "finish_reason": reason}

    def _chat_logprobs(self, index: int, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        def told(token: int, logprob: float) -> dict[str, Any]:
            text = self._token_text(token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        return {
            "content": [
                {**told(one.token, one.logprob), "top_logprobs": [told(*other) for other in one.top]}
                for one in logprobs
            ],
            "refusal": None,
        }

    def _text_logprobs(self, index: int, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        choice, offsets, texts = self._choices[index], list[int](), list[str]()
        for one in logprobs:
            texts.append(self._token_text(one.token))
            offsets.append(choice.told)
            choice.told += len(texts[-1])
        top = [{self._token_text(token): value for token, value in one.top} for one in logprobs]
        return {
            "tokens": texts, "token_logprobs": [one.logprob for one in logprobs], "text_offset": offsets,
            "top_logprobs": top,
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
