"""The load test, whatever the server: many streams, each answer with its times and what was wrong with it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

import numpy as np

IMPATIENT_SECONDS = 0.01


@dataclass(frozen=True)
class Question:
    """One prompt, and what decoding alone answers.

    Attributes:
        messages: the user's, perhaps after a system prompt.
        input_ids: of the chat template.
        tokens, text: the offline answer.
    """

    id: str
    messages: list[dict[str, str]]
    input_ids: list[int]
    tokens: list[int]
    text: str


@dataclass
class Answer:
    """What one request got.

    Attributes:
        status: "ok", "busy", "error", "lost" (an end without the last response), "cancelled" (by this client), "cut" (the load was
            over) or "mixed up" (another request's response).
        sent: seconds of the clock.
        pieces: of each response with tokens, when it came and how many.
        tokens_per_step: what the server says.
    """

    question: Question
    sent: float
    status: str = "lost"
    message: str = ""
    pieces: list[tuple[float, int]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    tokens_per_step: float = 0.0

    @property
    def is_equal(self) -> bool:
        """Tokens and text are the offline ones; of a cancelled answer, its beginning."""
        if self.status == "cancelled":
            return self.question.tokens[: len(self.tokens)] == self.tokens and self.question.text.startswith(self.text)
        return self.tokens == self.question.tokens and self.text == self.question.text


@dataclass(frozen=True)
class Load:
    """How many ask, and how long.

    Attributes:
        streams: requests in flight at any time.
        requests: all together; each stream sends its next one when its last one has ended.
        seconds: no request starts later.
        cancel: part of the requests that their clients give up, at a random one of their tokens.
        cuts: what is under way after ``seconds`` is given up.
    """

    streams: int
    requests: int
    max_tokens: int
    seconds: float = float("inf")
    cancel: float = 0.0
    seed: int = 0
    cuts: bool = False


@dataclass(frozen=True)
class Part:
    """A response of a server.

    Attributes:
        tokens: new ones.
        tokens_per_step: so far; 0 where this response does not say.
        is_last: the answer is complete.
    """

    tokens: list[int]
    text: str
    tokens_per_step: float = 0.0
    is_last: bool = False


class NoAnswerError(Exception):
    """What a request got instead of an answer.

    Args:
        status: of :class:`Answer`: "busy", "error" or "mixed up".
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


class Client(Protocol):
    """Asks a server, for all streams at once."""

    def parts(self, question: Question, request_id: str, max_tokens: int) -> AsyncGenerator[Part, None]:
        """One answer's responses; closing it gives the request up.

        Raises:
            NoAnswerError: as it says.
        """
        ...


async def run_load(client: Client, questions: list[Question], load: Load) -> tuple[list[Answer], float]:
    """Put a load on a server. Returns every request's answer, in the order of their ends, and the seconds that it took."""
    numbers, draw, answers = count(), random.Random(load.seed), list[Answer]()
    start = time.perf_counter()

    async def ask_on() -> None:
        while (number := next(numbers)) < load.requests and time.perf_counter() - start < load.seconds:
            question = questions[number % len(questions)]
            patience = draw.randint(0, load.max_tokens) if draw.random() < load.cancel else None
            answer = Answer(question, time.perf_counter())
            try:
                await _ask(client, answer, f"{number}", load.max_tokens, patience)
            finally:
                answers.append(answer)

    streams = [asyncio.ensure_future(ask_on()) for _ in range(load.streams)]
    _, under_way = await asyncio.wait(streams, timeout=load.seconds if load.cuts else None)
    seconds = time.perf_counter() - start
    for stream in under_way:
        stream.cancel()
    for ended in await asyncio.gather(*streams, return_exceptions=True):
        if isinstance(ended, BaseException) and not isinstance(ended, asyncio.CancelledError):
            raise ended
    return answers, seconds


async def _ask(client: Client, answer: Answer, request_id: str, max_tokens: int, patience: int | None) -> None:
    """One request; ``patience`` tokens are enough for a client that gives up."""
    async with aclosing(client.parts(answer.question, request_id, max_tokens)) as parts:
        try:
            if patience == 0:  # the server has the request, and hardly time to say anything
                await asyncio.wait_for(_listen(parts, answer), IMPATIENT_SECONDS)
            while answer.status != "ok" and (patience is None or len(answer.tokens) < patience):
                await _listen(parts, answer)
            if answer.status != "ok":
                answer.status = "cancelled"
        except asyncio.CancelledError:
            answer.status = "cut"
            raise
        except asyncio.TimeoutError:
            answer.status = "cancelled"
        except StopAsyncIteration:
            answer.message = "the stream ended before the answer"
        except NoAnswerError as error:
            answer.status, answer.message = error.status, f"{error}"
        except Exception as error:  # whatever the client library raises is what this request got
            answer.status, answer.message = "error", f"{error}"


async def _listen(parts: AsyncGenerator[Part, None], answer: Answer) -> None:
    """Take one response."""
    part = await anext(parts)
    if part.tokens:
        answer.pieces.append((time.perf_counter(), len(part.tokens)))
    answer.tokens += part.tokens
    answer.text += part.text
    answer.tokens_per_step = part.tokens_per_step or answer.tokens_per_step
    if part.is_last:
        answer.status = "ok"


def summary(answers: list[Answer], seconds: float, explain: Callable[[Answer], str]) -> dict[str, Any]:
    """The figures of one load, times in milliseconds.

    Tokens that came in one piece share the time since the piece before; a pause is the whole of it.

    Args:
        explain: why an answer is another one than the offline engine's: "tie" or "mismatch".
    """
    whole = [answer for answer in answers if answer.status == "ok"]
    first = [answer.pieces[0][0] - answer.sent for answer in answers if answer.pieces]
    pauses = [
        (now - before, tokens)
        for answer in answers
        for (before, _), (now, tokens) in zip(answer.pieces, answer.pieces[1:], strict=False)
    ]
    tokens = sum(len(answer.tokens) for answer in answers)
    statuses = [answer.status for answer in answers]
    verdicts = [
        "exact" if answer.is_equal else explain(answer) for answer in answers if answer.status in ("ok", "cancelled")
    ]
    return {
        "requests": len(answers), "seconds": round(seconds, 2), "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 2),
        "requests_per_second": round(len(whole) / seconds, 3),
        "time_to_first_token_ms": _quantiles(first),
        "inter_token_ms": _quantiles([pause / tokens for pause, tokens in pauses for _ in range(tokens)]),
        "pause_ms": _quantiles([pause for pause, _ in pauses]),
        "tokens_per_step": round(float(np.mean([answer.tokens_per_step for answer in whole])), 3) if whole else None,
        **{name: statuses.count(name) for name in ("ok", "cancelled", "cut", "busy", "error", "lost", "mixed up")},
        **{name: verdicts.count(name) for name in ("exact", "tie", "mismatch")},
        "messages": sorted({answer.message for answer in answers if answer.message})[:5],
    }  # fmt: skip


def _quantiles(seconds: list[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    return {"p50": round(float(p50), 2), "p99": round(float(p99), 2)}
