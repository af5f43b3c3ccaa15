"""The socket of a server, and how it ends; the text service is a stand-in."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.engines.serving.openai.connections import Connections
from medusa_export.engines.serving.openai.front import FrontOptions, OpenAIFront
from medusa_export.engines.serving.openai.prometheus import PrometheusMeter
from medusa_export.engines.serving.openai.server import bind, listen, run_front
from medusa_export.engines.serving.options import ServingOptions


def test_two_that_start_at_once() -> None:
    """Neither listens while it loads its model, so both can bind; the later one hears so when it would serve."""
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with bind("127.0.0.1", port) as second:
            listen(first)
            with pytest.raises(ConfigError, match=f"127.0.0.1:{port} .Address already in use"):
                listen(second)


def test_it_tells_that_it_stops_while_requests_end() -> None:
    """Listening on: a load balancer reads 503 until the last request in flight has ended."""
    scheduler = SimpleNamespace(is_open=True, running=1, waiting=0, decoder=SimpleNamespace(slots=1))
    may_end, seen = threading.Event(), list[int]()

    def close(**_: object) -> None:
        scheduler.is_open = False
        assert may_end.wait(30)

    service: Any = SimpleNamespace(options=ServingOptions(), scheduler=scheduler, close=close)
    front = OpenAIFront(service, FrontOptions("127.0.0.1", "m"), PrometheusMeter("m"))
    with bind("127.0.0.1", 0) as sock:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}/health"

        def look() -> None:
            try:
                with httpx.Client(trust_env=False) as client:
                    seen.append(client.get(url).status_code)
                    os.kill(os.getpid(), signal.SIGTERM)
                    while scheduler.is_open:
                        time.sleep(0.01)
                with httpx.Client(trust_env=False) as client:  # a connection of its own
                    seen.append(client.get(url).status_code)
            finally:
                may_end.set()

        watcher = threading.Thread(target=look)

        def say(text: str) -> None:
            if text.startswith("serving"):
                watcher.start()

        run_front(front, sock, Connections(0, 0), grace_s=20, say=say)
        watcher.join(30)
    assert seen == [200, 503]
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)
