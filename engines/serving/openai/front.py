"""OpenAI's protocol on a text service: what a request has to get past, and how its answer is told, whole or as it comes."""

from __future__ import annotations

import asyncio
import functools
import hmac
import ipaddress
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from medusa_export.core.errors import ConfigError
from medusa_export.engines.serving.grammar import GrammarError
from medusa_export.engines.serving.openai.async_answer import AsyncAnswer
from medusa_export.engines.serving.openai.bodies import Bodies
from medusa_export.engines.serving.openai.prometheus import PrometheusMeter
from medusa_export.engines.serving.openai.protocol.answers import Shape, Writer, event
from medusa_export.engines.serving.openai.protocol.asked import Asked, read_asked
from medusa_export.engines.serving.openai.protocol.errors import (
    FramingError,
    HostRefusedError,
    KeyRefusedError,
    MediaTypeError,
    UnfinishedError,
    UnknownModelError,
    body_of,
    require_answer,
)
from medusa_export.engines.serving.openai.protocol.fields import Endpoint
from medusa_export.engines.serving.openai.protocol.readers import joined, read_body, unsupported
from medusa_export.engines.serving.request import BusyError
from medusa_export.engines.serving.text_service import Piece, TextService

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

T = TypeVar("T")

JSON_GROWTH, JSON_ROOM = 6, 65_536  # JSON can spell a byte of text in six; a request has other fields too
logger = logging.getLogger(__name__)

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class FrontOptions:
    """How a front is reached.

    Attributes:
        host: where it listens.
        name: the model's, as clients know it.
        api_key: what clients have to show; None: nothing.
        strict: refuse fields that would be passed over.
        cors_origins: of web pages that may ask; "*" for all.
    """

    host: str
    name: str
    api_key: str | None = None
    strict: bool = False
    cors_origins: tuple[str, ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether other machines cannot reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class OpenAIFront:
    """Takes requests and answers them."""

    def __init__(self, service: TextService, options: FrontOptions, meter: PrometheusMeter) -> None:
        self.service, self.options, self.meter = service, options, meter
        self._executor = ThreadPoolExecutor(1, "medusa-export-requests")  # one after the other, as they came
        self.coming = 0  # requests whose bodies are there, and which are read and encoded
        self.bodies = Bodies(JSON_GROWTH * service.options.max_text_bytes + JSON_ROOM)

    def guard(self, request: Request) -> None:
        """Refuse what may not ask, before anything is read.

        Raises:
            KeyRefusedError: no key, or a wrong one.
            HostRefusedError: without a key, on loopback: a web page that calls this machine by another name (DNS rebinding).
            MediaTypeError: a web page could send it without asking, which it cannot for JSON.
            FramingError: a proxy might see another request in it than we do (request smuggling).
        """
        if "transfer-encoding" in request.headers and "content-length" in request.headers:
            got = "both Content-Length and Transfer-Encoding"
            raise FramingError("headers", got, "one of them", "leave Content-Length out")
        key = self.options.api_key
        if key is not None and not _shows(request.headers.get("authorization", ""), key):
            raise KeyRefusedError(
                "Authorization", "no key or a wrong one", "Bearer and the key", "ask who runs the server"
            )
        host = request.headers.get("host", "")
        if key is None and self.options.is_local and not _is_named(host, (*LOOPBACK_NAMES, self.options.host)):
            action = "call it by that name, or have it ask for a key"
            raise HostRefusedError("Host", f"{host[:64]!r}", " or ".join(LOOPBACK_NAMES[:2]), action)
        media = request.headers.get("content-type", "")
        if request.method == "POST" and media.partition(";")[0].strip().lower() != "application/json":
            raise MediaTypeError("Content-Type", f"{media[:64]!r}", "application/json", "send the header")

    async def answer(self, endpoint: Endpoint, shape: Shape, request: Request) -> Response:
        """The response to a request.

        Args:
            endpoint: reads the request's body.
            shape: writes the answer.
            request: starlette's.

        Raises:
            MedusaExportError: a request that is not answered.
            ClientDisconnect: the client has gone.
        """
        from starlette.responses import JSONResponse

        asked, answer = await self._queue(endpoint, request)
        writer = self._writer(shape, asked, answer.prompt_tokens)
        try:
            if not asked.streams:
                await while_connected(request, _take_all(writer, answer))
                return JSONResponse(writer.whole())
            pieces = answer.pieces()
            first = await while_connected(request, anext(pieces))
            require_answer(first[1].end)  # while there still is a status to say it with
            return _stream_class()(_events(writer, first, pieces), answer)
        except BaseException:
            answer.cancel()
            raise

    async def read_body(self, request: Request) -> dict[str, Any]:
        """The JSON object of a request.

        Raises:
            ConfigError: none, too large a one, or one that does not come.
        """
        async with self._parsed(request) as body:
            return body

    async def run(self, work: Callable[[], T]) -> T:
        """The result of work that takes long, where requests are encoded, one after the other."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def require_model(self, name: str) -> None:
        """Raise UnknownModelError for another model than the one that is served."""
        if name != self.options.name:
            raise UnknownModelError("model", repr(name[:64]), self.options.name, "see /v1/models")

    def read_values(self, endpoint: Endpoint, body: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a request; fields that are passed over are counted.

        Raises:
            ConfigError: a request that is not answered.
        """
        values, passed_over = endpoint.read(body, strict=self.options.strict)
        for name in passed_over:
            if self.meter.passed_over(name):
                logger.warning("a field that this server does not honour is passed over", extra={"field": name})
        self.require_model(values["model"])
        return values

    async def _queue(self, endpoint: Endpoint, request: Request) -> tuple[Asked, AsyncAnswer]:
        """What a request asks for, and its answer to come."""
        async with self._parsed(request) as body:
            values = self.read_values(endpoint, body)
            self._require_unread(values)
            asked = await self.run(lambda: read_asked(values, self.service.options.max_tokens))
            answer = AsyncAnswer(self.service, asked.requests, self._executor)
            try:
                self._require_room(asked)
                await answer.submit()
            except ConfigError as error:  # the service knows no fields
                answer.cancel()
                if error.where not in endpoint.readers:
                    error.where = endpoint.content
                raise
            except BaseException:
                answer.cancel()
                raise
            return asked, answer

    def _require_unread(self, values: Mapping[str, Any]) -> None:
        """Raise UnsupportedError for what the chat template would read: it gets messages alone. What it does not read is idle."""
        given = dict(values.get("chat_template_kwargs", {}))
        if "reasoning_effort" in values:  # which vLLM hands on to the template
            given["reasoning_effort"] = values["reasoning_effort"]
        if not given:
            return
        read = set(re.findall(r"\w+", str(self.service.tokenizer.chat_template)))
        for name in read & given.keys():
            where = name if name in values else joined("chat_template_kwargs", name)
            raise unsupported(where, given[name], "nothing that the chat template reads")

    @asynccontextmanager
    async def _parsed(self, request: Request) -> AsyncIterator[dict[str, Any]]:
        """A request's JSON object. Inside of the context, the request counts as coming in.

        Raises:
            ConfigError: none, or a body that is not taken.
            BusyError: too many come in.
        """
        async with self.bodies.read(request) as data:
            limit = self.service.scheduler.decoder.slots + self.service.options.max_queue
            if self.coming >= limit:
                raise BusyError("server", f"a request while {limit} come in", "fewer", "try again in a moment")
            self.coming += 1
            try:
                yield await self.run(lambda: read_body(data))  # elsewhere: large ones would hold up everybody's answers
            finally:
                self.coming -= 1

    def _require_room(self, asked: Asked) -> None:
        limit = self.service.scheduler.decoder.slots + self.service.options.max_queue
        if len(asked.requests) > limit:
            raise ConfigError(
                "n", f"{len(asked.requests)} answers", f"at most {limit}, of all prompts", "ask for fewer"
            )

    def _writer(self, shape: Shape, asked: Asked, prompt_tokens: list[int]) -> Writer:
        prompts = [
            request.prompt or self.service.decode(request.prompt_ids) for request in asked.requests if asked.echoes
        ]
        return Writer(shape, self.options.name, asked, self.service, prompts, prompt_tokens)


async def _take_all(writer: Writer, answer: AsyncAnswer) -> None:
    async for index, piece in answer.pieces():
        writer.take(index, piece)


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of some work, which is cancelled when the client goes first.

    Raises:
        ClientDisconnect: it did.
    """
    from starlette.requests import ClientDisconnect

    tasks = working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    writer: Writer, first: tuple[int, Piece], pieces: AsyncIterator[tuple[int, Piece]]
) -> AsyncIterator[str]:
    """The events of a stream."""
    yield writer.first()
    try:
        yield writer.piece(*first)
        async for index, piece in pieces:
            if events := writer.piece(index, piece):
                yield events
    except (UnfinishedError, GrammarError) as error:  # its status is gone, and OpenAI's clients raise on such an event
        yield event(body_of(error))


@functools.cache
def _stream_class() -> Any:
    from starlette.responses import StreamingResponse

    class EventStream(StreamingResponse):
        """Frees the slot of its answer however it ends: a client may be gone before its generator has begun."""

        def __init__(self, events: AsyncIterator[str], answer: AsyncAnswer) -> None:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # for proxies
            super().__init__(events, media_type="text/event-stream", headers=headers)
            self._answer = answer

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            try:
                await super().__call__(scope, receive, send)
            finally:
                self._answer.cancel()

    return EventStream


def _shows(authorization: str, key: str) -> bool:
    scheme, _, shown = authorization.partition(" ")
    # In a time that does not tell how much of the key was right.
    return hmac.compare_digest(shown.strip().encode("utf-8", "replace"), key.encode()) and scheme.lower() == "bearer"


def _is_named(host: str, names: tuple[str, ...]) -> bool:
    try:
        return urlsplit(f"//{host}").hostname in names
    except ValueError:
        return False
