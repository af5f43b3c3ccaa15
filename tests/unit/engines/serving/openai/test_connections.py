"""Connections that say nothing, half a request, or too much at once; on real sockets, with an application that answers at once."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn

from medusa_export.engines.serving.openai import connections as connections_module
from medusa_export.engines.serving.openai.connections import Connections, protocol_class

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def refusing(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 429, "headers": [(b"connection", b"close")]})
    await send({"type": "http.response.body", "body": b"no"})


@contextlib.asynccontextmanager
async def serving(connections: Connections) -> AsyncIterator[int]:
    sock = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app,
        http=protocol_class(connections, refusing),
        lifespan="off",
        log_config=None,
        loop="asyncio",
        ws="none",
        timeout_keep_alive=round(connections.idle_s) or 1,
    )
    server = uvicorn.Server(config)
    task = asyncio.ensure_future(server.serve([sock]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        await task


async def talk(port: int, said: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(said)
    return reader, writer


def test_silence_and_half_requests_end() -> None:
    async def run() -> None:
        connections = Connections(0, 0, header_s=0.3, idle_s=0.3)
        async with serving(connections) as port:
            for said in (b"", b"GET / HTTP/1.1\r\nHo", GET, GET + b"GET /"):
                reader, writer = await talk(port, said)
                heard = await asyncio.wait_for(reader.read(), 30)  # to the end: closed by the server
                assert heard.count(b"200 OK") == said.count(GET)
                writer.close()
            assert not connections.by_client

    asyncio.run(run())


def test_a_connection_may_rest_behind_an_answer() -> None:
    """Longer than headers may take: clients use it again, and one that is closed just then costs a request."""

    async def run() -> None:
        connections = Connections(0, 0, header_s=0.2, idle_s=30)
        async with serving(connections) as port:
            reader, writer = await talk(port, GET)
            assert b"200 OK" in await reader.readuntil(b"ok")
            await asyncio.sleep(0.6)
            writer.write(GET)
            assert b"200 OK" in await reader.readuntil(b"ok")
            writer.write(b"GET / HT")  # from here on, the header's time counts
            assert await asyncio.wait_for(reader.read(), 20) == b""
            writer.close()

    asyncio.run(run())


def test_time_in_which_the_loop_stands_still_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without time, what a client sent long ago may not have been read yet."""
    monkeypatch.setattr(connections_module, "LATE_SECONDS", 0.2)

    async def run() -> None:
        async with serving(Connections(0, 0, header_s=0.4)) as port:
            reader, writer = await talk(port, b"")
            await asyncio.sleep(0.1)
            time.sleep(0.8)
            await asyncio.sleep(0.01)
            writer.write(GET)
            assert b"200 OK" in await asyncio.wait_for(reader.readuntil(b"ok"), 20)
            writer.close()

    asyncio.run(run())


POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc"


def test_the_rest_of_a_body_that_nobody_waits_for_is_read() -> None:
    """A connection that is closed while its client still sends is reset, and the client loses the answer."""

    async def run() -> None:
        async with serving(Connections(0, 0, header_s=60)) as port:
            reader, writer = await talk(port, POST)
            assert b"200 OK" in await asyncio.wait_for(reader.readuntil(b"ok"), 30)
            await asyncio.sleep(0.05)
            writer.write(b"x" * 997 + GET)
            assert b"200 OK" in await asyncio.wait_for(reader.readuntil(b"ok"), 30)
            writer.close()

    asyncio.run(run())


def test_the_rest_of_a_body_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections_module, "REST_SECONDS", 0.3)

    async def run() -> None:
        async with serving(Connections(0, 0, header_s=60)) as port:
            reader, writer = await talk(port, POST)
            assert (await asyncio.wait_for(reader.read(), 30)).endswith(b"ok")
            writer.close()

    asyncio.run(run())


def test_a_bad_rest_of_a_body_closes() -> None:
    async def run() -> None:
        async with serving(Connections(0, 0, header_s=60)) as port:
            reader, writer = await talk(port, b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            assert b"200 OK" in await asyncio.wait_for(reader.readuntil(b"ok"), 30)
            writer.write(b"no chunk\r\n")
            assert await asyncio.wait_for(reader.read(), 30) == b""
            writer.close()

    asyncio.run(run())


def test_connections_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who comes too many hears so, for as many as there is room for; further ones, and those who say nothing, are closed."""
    monkeypatch.setattr(connections_module, "REFUSED_AT_ONCE", 1)
    monkeypatch.setattr(connections_module, "REFUSED_SECONDS", 0.5)

    async def run() -> None:
        connections = Connections(0, 2, header_s=60)
        async with serving(connections) as port:
            held = [await talk(port, GET) for _ in range(2)]
            for reader, _ in held:
                assert b"200" in await reader.readline()
            many = [await talk(port, b"") for _ in range(2)]  # the first one may say something
            assert await asyncio.wait_for(many[1][0].read(), 0.4) == b""
            assert await asyncio.wait_for(many[0][0].read(), 30) == b""
            reader, writer = await talk(port, POST)
            await asyncio.sleep(0.05)
            writer.write(b"x" * 997)
            heard = await asyncio.wait_for(reader.read(), 30)
            assert heard.startswith(b"HTTP/1.1 429")
            assert b"no" in heard.splitlines()
            for _, each in (*many, (reader, writer)):
                each.close()
            assert not connections.refused
            held[0][1].close()
            while connections.by_client["127.0.0.1"] > 1:
                await asyncio.sleep(0.01)
            reader, writer = await talk(port, GET)
            assert b"200" in await reader.readline()
            writer.close()
            held[1][1].close()

    asyncio.run(run())


def test_limits() -> None:
    connections = Connections(3, 2)
    assert [connections.enter(client) for client in "aaabb"] == [True, True, False, True, False]
    connections.leave("a")
    assert connections.enter("b")
    assert Connections(0, 0).enter("a")
