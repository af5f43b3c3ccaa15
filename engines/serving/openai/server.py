"""Runs the OpenAI front: a socket, uvicorn on it, and an end that lets running requests finish."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from medusa_export.core.errors import ConfigError, missing_package
from medusa_export.engines.serving.openai.app import build_app, refusing_app
from medusa_export.engines.serving.openai.connections import Connections, protocol_class
from medusa_export.engines.serving.openai.front import OpenAIFront

MARGIN_SECONDS = 5  # for answers and errors to reach clients once the grace time is over
BACKLOG = 1024
TICK_SECONDS = 0.1  # between looks for a second Ctrl-C


def bind(host: str, port: int) -> socket.socket:
    """A socket of an address, which refuses connections until it is served on.

    Raises:
        ConfigError: an address that cannot be had.
    """
    if not 0 <= port < 1 << 16:  # what the system would take modulo 65536
        raise ConfigError("--port", f"{port}", "0 .. 65535", "choose another one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except (OSError, OverflowError) as error:
        raise _taken(f"{host}:{port}", error) from error
    return sock


def listen(sock: socket.socket) -> None:
    """Take connections. Only now, when they can be answered: probes take a server that listens for one that is ready.

    Raises:
        ConfigError: another server, which was started at the same time, listens there.
    """
    try:
        sock.listen(BACKLOG)
    except OSError as error:
        host, port = sock.getsockname()[:2]
        raise _taken(f"{host}:{port}", error) from error


def _taken(address: str, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or str(error)
    return ConfigError("--host, --port", f"{address} ({reason})", "a free address", "choose another one")


def run_front(
    front: OpenAIFront,
    sock: socket.socket,
    connections: Connections,
    *,
    grace_s: float,
    say: Callable[[str], None],
) -> None:
    """Serve until SIGTERM or SIGINT; then running requests finish, for a while, and further ones are refused.

    Args:
        connections: how many there may be, and for how long they may be idle.
        grace_s: for requests in flight; those that take longer end with an error that says so.
        say: is told that it serves, and that it stops.

    Raises:
        ConfigError: another server has taken the address meanwhile.
        MissingPackageError: no uvicorn.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise missing_package("uvicorn", "serve") from error
    service = front.service

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            say(f"serving {_address(sock)}; SIGTERM or Ctrl-C ends it")

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            scheduler = service.scheduler
            say(f"stopping: {scheduler.running + scheduler.waiting} requests in flight, up to {grace_s:g} s for them")
            drain = partial(service.close, drain=True, timeout_s=grace_s)
            drained = asyncio.get_running_loop().run_in_executor(None, drain)
            while (
                not drained.done()
            ):  # listening on: load balancers and clients read that it stops, instead of a refused connection
                await asyncio.wait([drained], timeout=TICK_SECONDS)
                if self.force_exit:  # a second Ctrl-C
                    service.close()
            await drained
            await super().shutdown(sockets)

    protocol = protocol_class(connections, refusing_app(front, connections))
    config = uvicorn.Config(
        build_app(front), log_config=None, access_log=False, http=protocol, loop="asyncio", ws="none",
        lifespan="off", proxy_headers=False, server_header=False, backlog=BACKLOG,
        timeout_graceful_shutdown=MARGIN_SECONDS, timeout_keep_alive=round(connections.idle_s),
    )  # fmt: skip
    server = Server(config)
    listen(sock)
    with _stopped_by_signals(server):
        server.run(sockets=[sock])


@contextmanager
def _stopped_by_signals(server: Any) -> Iterator[None]:
    """SIGTERM and SIGINT are the way to end it: uvicorn raises them once more when it has ended, and that means nothing then."""

    def stop(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
