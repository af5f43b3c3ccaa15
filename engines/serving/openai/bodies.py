"""Bodies of requests as they come in: how long one may take, and how much memory the unfinished ones may hold."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from medusa_export.engines.serving.openai.protocol.errors import BodySizeError, SlowBodyError
from medusa_export.engines.serving.request import BusyError

if TYPE_CHECKING:
    from starlette.requests import Request

BODY_SECONDS = 30.0  # in which a body has to come
# Of each body, so many bytes count for nothing: its connection may hold as many anyway, and connections are limited. So a client that
# sends many small bodies slowly, because it has many streams or no processor, keeps nobody out and is not refused.
FREE_BYTES = 65_536
CLIENT_BODIES, ALL_BODIES = 8, 32  # of the largest size, what is beyond may add up to: of one client, and of all


class Bodies:
    """Reads bodies, and knows how much of them is in memory.

    Args:
        limit: bytes of one.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held: Counter[str] = Counter()  # bytes beyond the free ones, by client

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """A request's body, which counts as held inside of the context.

        Raises:
            BodySizeError: a body beyond the limit.
            SlowBodyError: one that does not come in time.
            BusyError: unfinished ones hold too much memory.
        """
        said = request.headers.get("content-length", "0")
        if not said.isdecimal() or int(said[:20]) > self.limit:
            raise BodySizeError("body", f"{said[:20]} bytes", f"at most {self.limit}", "shorten the request")
        body, client = bytearray(), request.client.host if request.client else ""
        coming = asyncio.ensure_future(self._collect(request, body, client))
        try:
            await asyncio.wait([coming], timeout=BODY_SECONDS)
            if not coming.done():
                raise SlowBodyError("body", "a part", f"all of it within {BODY_SECONDS:g} s", "send it faster")
            coming.result()
            yield bytes(body)
        finally:
            coming.cancel()
            self._hold(client, -_beyond(body))

    async def _collect(self, request: Request, body: bytearray, client: str) -> None:
        async for chunk in request.stream():
            if len(body) + len(chunk) > self.limit:
                raise BodySizeError("body", "more bytes", f"at most {self.limit}", "shorten the request")
            size = _beyond(body, len(chunk)) - _beyond(body)
            self._require_room(client, size)
            self._hold(client, size)
            body += chunk

    def _require_room(self, client: str, size: int) -> None:
        limits = (self.held[client], CLIENT_BODIES, "of one client"), (self.held.total(), ALL_BODIES, "in all")
        for held, bodies, whose in limits:
            if size and held + size > bodies * self.limit:
                got = f"{held} bytes of unfinished bodies {whose}"
                raise BusyError("server", got, f"at most {bodies * self.limit}", "try again in a moment")

    def _hold(self, client: str, size: int) -> None:
        self.held[client] += size
        if not self.held[client]:
            del self.held[client]


def _beyond(body: bytearray, more: int = 0) -> int:
    """Bytes of a body that count."""
    return max(len(body) + more - FREE_BYTES, 0)
