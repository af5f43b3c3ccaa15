"""OpenAI's protocol on a text service: what a request has to get past, and how its answer is told, whole or as it comes."""

from __future__ import annotations

import asyncio
import functools
import hmac
import ipaddress
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from medusa_export.core.errors import ConfigError
from medusa_export.engines.serving.openai.answers import Shape, Writer, event, text_request
from medusa_export.engines.serving.openai.async_answer import AsyncAnswer
from medusa_export.engines.serving.openai.errors import (
    BodySizeError,
    HostRefusedError,
    KeyRefusedError,
    MediaTypeError,
    SlowBodyError,
    UnfinishedError,
    UnknownModelError,
    body_of,
    require_answer,
)
from medusa_export.engines.serving.openai.fields import Endpoint, read_body
from medusa_export.engines.serving.request import BusyError
from medusa_export.engines.serving.text_service import TextService

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

T = TypeVar("T")

BODY_SECONDS = 30.0  # in which a body has to come
JSON_GROWTH, JSON_ROOM = 6, 65_536  # JSON can spell a byte of text in six; a request has other fields too
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class FrontOptions:
    """How a front is reached.

    Attributes:
        host: where it listens.
        name: the model's, as clients know it.
        api_key: what clients have to show; None: nothing.
    """

    host: str
    name: str
    api_key: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether other machines cannot reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class OpenAIFront:
    """Takes requests and answers them."""

    def __init__(self, service: TextService, options: FrontOptions) -> None:
        self.service, self.options = service, options
        self._executor = ThreadPoolExecutor(1, "medusa-export-requests")  # one after the other, as they came
        self._coming = 0  # requests that are read and encoded

    @property
    def max_body_bytes(self) -> int:
        """Of a request, at most."""
        return JSON_GROWTH * self.service.options.max_text_bytes + JSON_ROOM

    def guard(self, request: Request) -> None:
        """Refuse what may not ask, before anything is read.

        Raises:
            KeyRefusedError: no key, or a wrong one.
            HostRefusedError: without a key, on loopback: a web page that calls this machine by another name (DNS rebinding).
            MediaTypeError: a web page could send it without asking, which it cannot for JSON.
        """
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

        Raises:
            MedusaExportError: a request that is not answered.
            ClientDisconnect: nobody waits for it any more.
        """
        from starlette.responses import JSONResponse

        values, answer = await self._queue(endpoint, request)
        writer = Writer(shape, self.options.name, bool(values.get("stream_options")))
        try:
            if not values.get("stream"):
                text, end = await while_connected(request, answer.whole())
                require_answer(end)
                return JSONResponse(writer.whole(text, end))
            pieces = answer.pieces()
            first = await while_connected(request, anext(pieces))
            require_answer(first.end)  # while there still is a status to say it with
            return _stream_class()(_events(writer, first, pieces), answer)
        except BaseException:
            answer.cancel()
            raise

    async def _queue(self, endpoint: Endpoint, request: Request) -> tuple[dict[str, Any], AsyncAnswer]:
        """The values of a request, and its answer to come."""
        limit = self.service.scheduler.decoder.slots + self.service.options.max_queue
        if self._coming >= limit:  # a body of each is in memory
            raise BusyError("server", f"a request while {limit} come in", "fewer", "try again in a moment")
        self._coming += 1
        try:
            data = await self._read(request)
            loop = asyncio.get_running_loop()  # parsed elsewhere: large bodies would hold up everybody's answers
            values = await loop.run_in_executor(self._executor, lambda: endpoint.read(read_body(data)))
            if values["model"] != self.options.name:
                raise UnknownModelError("model", repr(values["model"][:64]), self.options.name, "see /v1/models")
            asked = text_request(values, self.service.options.max_tokens)
            answer = AsyncAnswer(self.service, asked, self._executor)
            try:
                await answer.submit()
            except ConfigError as error:  # the service knows no fields
                where = error.where if error.where in endpoint.readers else endpoint.content
                raise type(error)(where, error.got, error.expected, error.action) from error
            except BaseException:
                answer.cancel()
                raise
            return values, answer
        finally:
            self._coming -= 1

    async def _read(self, request: Request) -> bytes:
        """The body, if it comes in time and is not too large."""
        limit, said = self.max_body_bytes, request.headers.get("content-length", "0")

        async def collect() -> bytes:
            body = bytearray()
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise BodySizeError("body", "more bytes", f"at most {limit}", "shorten the request")
            return bytes(body)

        if not said.isdecimal() or int(said[:20]) > limit:
            raise BodySizeError("body", f"{said[:20]} bytes", f"at most {limit}", "shorten the request")
        try:
            return await asyncio.wait_for(collect(), BODY_SECONDS)
        except asyncio.TimeoutError as error:
            raise SlowBodyError("body", "a part", f"all of it within {BODY_SECONDS:g} s", "send it faster") from error


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


async def _events(writer: Writer, first: Any, pieces: AsyncIterator[Any]) -> AsyncIterator[str]:
    """The events of a stream."""
    yield writer.first()
    piece = first
    while True:
        if piece.text:
            yield writer.text(piece.text)
        if piece.end is not None:
            break
        piece = await anext(pieces)
    try:
        require_answer(piece.end)
    except UnfinishedError as error:  # its status is gone, and OpenAI's clients raise on such an event
        yield event(body_of(error))
    else:
        yield writer.last(piece.end)


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
