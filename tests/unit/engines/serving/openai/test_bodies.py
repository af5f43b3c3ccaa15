"""Bodies that are too large, too slow, or too many at once; requests are stand-ins whose parts a test sends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import Request

from medusa_export.engines.serving.openai import bodies as bodies_module
from medusa_export.engines.serving.openai.bodies import FREE_BYTES, Bodies
from medusa_export.engines.serving.openai.protocol.errors import BodySizeError, SlowBodyError
from medusa_export.engines.serving.request import BusyError


class Sent:
    """A request of an address, and what has come of its body."""

    def __init__(self, *parts: bytes, address: str = "10.0.0.1", length: str | None = None) -> None:
        self.messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        for part in parts:
            self.send(part)
        headers = [(b"content-length", length.encode())] if length is not None else []
        self.request = Request({"type": "http", "headers": headers, "client": (address, 1)}, self.messages.get)

    def send(self, part: bytes, *, is_last: bool = False) -> None:
        self.messages.put_nowait({"type": "http.request", "body": part, "more_body": not is_last})


async def read(bodies: Bodies, sent: Sent) -> bytes:
    async with bodies.read(sent.request) as body:
        return body


def test_one_comes_in_parts() -> None:
    async def run() -> None:
        bodies, sent = Bodies(100_000), Sent(b"a" * 60_000, b"b" * 10_000)
        coming = asyncio.ensure_future(read(bodies, sent))
        await asyncio.sleep(0.01)
        assert bodies.held == {"10.0.0.1": 70_000 - FREE_BYTES}
        sent.send(b"c" * 30_000, is_last=True)
        assert await coming == b"a" * 60_000 + b"b" * 10_000 + b"c" * 30_000
        assert not bodies.held

    asyncio.run(run())


@pytest.mark.parametrize(
    "sent",
    [
        lambda: Sent(length="101"),
        lambda: Sent(length="9" * 5000),
        lambda: Sent(length="-1"),
        lambda: Sent(b" " * 100, b" "),
    ],
)
def test_too_large(sent: Any) -> None:
    bodies = Bodies(100)
    with pytest.raises(BodySizeError):
        asyncio.run(read(bodies, sent()))
    assert not bodies.held


def test_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies_module, "BODY_SECONDS", 0.05)
    bodies = Bodies(100_000)
    with pytest.raises(SlowBodyError):
        asyncio.run(read(bodies, Sent(b"x" * 90_000)))
    assert not bodies.held


def test_memory_of_unfinished_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one client and of all; small bodies are taken then, too."""
    monkeypatch.setattr(bodies_module, "CLIENT_BODIES", 2)
    monkeypatch.setattr(bodies_module, "ALL_BODIES", 3)
    limit = 100_000
    large = b"x" * (limit - 1)

    async def run() -> None:
        bodies = Bodies(limit)
        counted = len(large) - FREE_BYTES
        of_one, of_all = 2 * limit // counted, 3 * limit // counted
        held = [asyncio.ensure_future(read(bodies, Sent(large))) for _ in range(of_one)]
        await asyncio.sleep(0.02)
        with pytest.raises(BusyError, match="of one client"):
            await read(bodies, Sent(large))
        others = [Sent(large, address=f"10.0.1.{number}") for number in range(of_all - of_one)]
        held += [asyncio.ensure_future(read(bodies, other)) for other in others]
        await asyncio.sleep(0.02)
        assert not any(task.done() for task in held)
        with pytest.raises(BusyError, match="in all"):
            await read(bodies, Sent(large, address="10.0.2.1"))
        small = Sent()
        small.send(b"y" * FREE_BYTES, is_last=True)
        assert await read(bodies, small) == b"y" * FREE_BYTES
        for task in held:
            task.cancel()
        await asyncio.wait(held)
        assert not bodies.held

    asyncio.run(run())
