"""A chat server on the loopback that answers by rule and fails on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

HANG_SECONDS = 30.0  # longer than any timeout in the tests; ``stop`` ends it


class FakeServer(ThreadingHTTPServer):
    """OpenAI's protocol. What the last message says decides the answer, so a rerun gets the same one.

    Attributes:
        faults: what befalls the next requests, one each: an HTTP status, or "hang", "truncated", "damaged", "disconnect",
            "partial" or JSON of a body.
        requests: bodies of the chat requests so far.
        delay: seconds that an answer takes, from its request.
        models: the names that it lists.
        key: the key that it wants, if any.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults: list[int | str | dict[str, Any]] = []
        self.requests: list[dict[str, Any]] = []
        self.delay: Callable[[dict[str, Any]], float] = lambda body: 0.0
        self.models = ["tiny"]
        self.key = ""
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.running = self.most_running = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def asked(self) -> list[str]:
        """The last message of every request."""
        return [body["messages"][-1]["content"] for body in self.requests]

    def stop(self) -> None:
        self.stopping.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that were killed, or gave up, are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self._refused():
            return
        self._send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append(body)
            fault = server.faults.pop(0) if server.faults else None
            server.running += 1
            server.most_running = max(server.most_running, server.running)
        try:
            time.sleep(server.delay(body))
            if not self._refused():
                self._answer(body, fault)
        finally:
            with server.lock:
                server.running -= 1

    def _refused(self) -> bool:
        wrong = bool(self.server.key) and self.headers["Authorization"] != f"Bearer {self.server.key}"
        if wrong:
            self._send(401, {"error": {"message": "wrong key"}})
        return wrong

    def _answer(self, body: dict[str, Any], fault: int | str | dict[str, Any] | None) -> None:
        asked = body["messages"][-1]["content"]
        if asked.startswith("status "):
            fault = int(asked.split()[1])
        complete = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": f"{asked}!"}, "finish_reason": "stop"}
            ],
            "usage": {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4},
        }
        choice = complete["choices"][0]  # type: ignore[index]
        if asked.startswith("long"):
            choice["finish_reason"] = "length"
        if asked.startswith("empty"):
            choice["message"]["content"] = " "
        if asked.startswith("surrogate"):
            choice["message"]["content"] = "\ud83d"
        if isinstance(fault, int):
            self._send(fault, {"error": {"message": f"status {fault}"}})
        elif isinstance(fault, dict):
            self._send(200, complete | fault)
        else:
            self._send_text(200, json.dumps(complete), fault)

    def _send(self, status: int, body: dict[str, Any]) -> None:
        self._send_text(status, json.dumps(body), None)

    def _send_text(self, status: int, text: str, fault: str | None) -> None:
        if fault == "disconnect":
            self.close_connection = True
            return
        if fault == "hang":
            self.server.stopping.wait(HANG_SECONDS)
            self.close_connection = True
            return
        if fault == "damaged":  # truncated, and the length is right
            text = text[: len(text) // 2]
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if status == 429:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(text[: len(text) // 2 if fault in ("truncated", "partial") else None].encode())
        if fault == "partial":
            self.wfile.flush()
            self.server.stopping.wait(HANG_SECONDS)
        if fault in ("truncated", "partial"):
            self.close_connection = True


@pytest.fixture
def fake_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], FakeServer]]:
    """``fake_server() -> FakeServer``, already serving; as many as a test wants. No proxy and no key are in the way."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    started: list[FakeServer] = []

    def start() -> FakeServer:
        server = FakeServer()
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.stop()
