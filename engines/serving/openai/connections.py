"""Limits of connections: how many there are, in all and of one client, and how long one may say nothing or half a request.

Who is refused hears why, as an answer: clients know what to do with a 429, and call a reset a broken server.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

HEADER_SECONDS = 30.0  # in which a request's headers have to be there, from the connection or their first byte on
# Longer than clients and proxies keep a connection for further use (httpx 5 s, aiohttp 15 s, nginx 60 s): where the server closes it
# first, a request that is under way just then is lost.
IDLE_SECONDS = 75.0
REFUSED_SECONDS, REFUSED_AT_ONCE = 2.0, 64  # a connection too many may stay to hear why, and so many of them
# What a client still sends when it has been answered is read: a connection that is closed before is reset, and the answer lost.
REST_SECONDS = 5.0
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
    refused: int = 0  # connections too many that hear so just now

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


class _Timed:
    """Half of an H11Protocol: closes its connection when nothing has been answered for a while."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    cycle: Any
    _timer: asyncio.TimerHandle | None = None
    _is_idle = False  # behind an answer, before the next request's first byte

    def _rest(self, seconds: float) -> None:
        """Wait for the next request, if it is not there yet."""
        if not self._is_busy():
            self._is_idle = True
            self._arm(seconds)

    def _is_busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _arm(self, seconds: float) -> None:
        self._disarm()
        due = self.loop.time() + seconds
        self._timer = self.loop.call_at(due, self._close_idle, due, seconds)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _close_idle(self, due: float, seconds: float) -> None:
        if self._is_busy():
            return
        if self.loop.time() - due > LATE_SECONDS:
            self._arm(seconds)
        else:
            self.transport.close()


def protocol_class(connections: Connections, refusing: Any) -> Any:
    """uvicorn's HTTP protocol with these limits.

    Args:
        refusing: the application that answers connections too many; it has to close them.
    """
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class LimitedProtocol(_Timed, H11Protocol):
        _client: str | None = None  # where it is counted
        _is_refused = False
        _has_rest = False  # behind an answer that did not wait for its request's whole body

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            client = self.client[0] if self.client else ""
            if connections.enter(client):
                self._client = client
                self._arm(connections.header_s)
            elif connections.refused < REFUSED_AT_ONCE:
                connections.refused += 1
                self._is_refused, self.app = True, refusing
                self._arm(REFUSED_SECONDS)
            else:
                transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._client is not None:
                connections.leave(self._client)
            connections.refused -= self._is_refused
            self._disarm()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():  # one that was refused
                return
            if self._is_idle:
                self._is_idle = False
                self._arm(connections.header_s)
            super().data_received(data)
            if self._has_rest and self.conn.their_state is not h11.SEND_BODY:
                self._has_rest = False
                self._rest(connections.idle_s)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.their_state is h11.SEND_BODY:
                self._has_rest = True
                self._arm(REST_SECONDS)
            else:
                self._rest(connections.idle_s)

        def send_400_response(self, msg: str) -> None:
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                super().send_400_response(msg)
            else:  # there is an answer already, or a part of it
                self.transport.close()

    return LimitedProtocol
