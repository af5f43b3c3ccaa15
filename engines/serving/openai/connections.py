"""Limits of connections: how many there are, in all and of one client, and how long one may say nothing or half a request."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

HEADER_SECONDS = 10.0  # in which a request's headers have to be there, from the connection or their first byte on
# Longer than clients and proxies keep a connection for further use (httpx 5 s, aiohttp 15 s, nginx 60 s): where the server closes it
# first, a request that is under way just then is lost.
IDLE_SECONDS = 75.0
LATE_SECONDS = 1.0  # a loop that stood still for longer has read nothing meanwhile: the time does not count


@dataclass
class Connections:
    """Counts the open ones.

    Attributes:
        most, most_per_client: at once; 0 for any number. Clients are told apart by their addresses.
        header_s: for a request's headers.
        idle_s: for the next request behind an answer.
    """

    most: int
    most_per_client: int
    header_s: float = HEADER_SECONDS
    idle_s: float = IDLE_SECONDS
    by_client: Counter[str] = field(default_factory=Counter)

    def enter(self, client: str) -> bool:
        """Count one more, if it may be."""
        if self.most and self.by_client.total() >= self.most:
            return False
        if self.most_per_client and self.by_client[client] >= self.most_per_client:
            return False
        self.by_client[client] += 1
        return True

    def leave(self, client: str) -> None:
        """One has ended."""
        self.by_client[client] -= 1
        if not self.by_client[client]:
            del self.by_client[client]


def protocol_class(connections: Connections) -> Any:
    """uvicorn's HTTP protocol with these limits."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class LimitedProtocol(H11Protocol):
        _client = ""  # where it is counted
        _timer: asyncio.TimerHandle | None = None
        _is_idle = False  # behind an answer, before the next request's first byte

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            client = self.client[0] if self.client else ""
            if not connections.enter(client):
                transport.close()
                return
            self._client = client
            self._arm(connections.header_s)

        def connection_lost(self, exc: Exception | None) -> None:
            if self._client:
                connections.leave(self._client)
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():  # one that was refused
                return
            if self._is_idle:
                self._is_idle = False
                self._arm(connections.header_s)
            super().data_received(data)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.their_state is h11.SEND_BODY:  # of a body that was refused, the rest is not waited for
                self.transport.close()
            elif not self._is_busy():
                self._is_idle = True
                self._arm(connections.idle_s)

        def _is_busy(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _arm(self, seconds: float) -> None:
            if self._timer is not None:
                self._timer.cancel()
            due = self.loop.time() + seconds
            self._timer = self.loop.call_at(due, self._close_idle, due, seconds)

        def _close_idle(self, due: float, seconds: float) -> None:
            if self._is_busy():
                return
            if self.loop.time() - due > LATE_SECONDS:
                self._arm(seconds)
            else:
                self.transport.close()

    return LimitedProtocol
