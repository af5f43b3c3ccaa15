"""Failures of our own reach clients as such and no further; the text service is a stand-in."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from medusa_export.core.errors import CheckpointError, MedusaExportError
from medusa_export.engines.serving.openai.app import build_app, refusing_app
from medusa_export.engines.serving.openai.connections import Connections
from medusa_export.engines.serving.openai.front import FrontOptions, OpenAIFront
from medusa_export.engines.serving.openai.prometheus import PrometheusMeter
from medusa_export.engines.serving.options import ServingOptions

BODY = {"model": "m", "prompt": "hi"}


def respond(
    method: str,
    path: str,
    error: Exception | None = None,
    *,
    is_open: bool = True,
    waiting: int = 0,
    origins: tuple[str, ...] = (),
    **options: Any,
) -> httpx.Response:
    """The application's response, without a socket."""

    def submit(*_: object) -> None:
        assert error is not None
        raise error

    scheduler = SimpleNamespace(decoder=SimpleNamespace(slots=1), is_open=is_open, waiting=waiting)
    service: Any = SimpleNamespace(
        options=ServingOptions(max_queue=5), scheduler=scheduler, submit=submit, max_length=77, token_text=lambda token: f"<{token}>",
        encode=lambda request: [len(request.prompt), 9], decode=lambda tokens: " ".join(map(str, tokens)),
    )  # fmt: skip
    front = OpenAIFront(service, FrontOptions("127.0.0.1", "m", cors_origins=origins), PrometheusMeter("m"))
    transport = httpx.ASGITransport(build_app(front), raise_app_exceptions=False)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **options)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "error",
    [RuntimeError("in /a/secret/path.py"), KeyError("secret"), CheckpointError("/a/secret/path", "x", "y", "z")],
    ids=lambda error: type(error).__name__,
)
def test_failures_of_our_own(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    response = respond("POST", "/v1/completions", error, json=BODY)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert response.headers["x-should-retry"] == "false"
    if isinstance(error, MedusaExportError):  # the others are logged by uvicorn
        assert "secret" in caplog.text


def test_a_connection_too_many_hears_so() -> None:
    service: Any = SimpleNamespace(options=ServingOptions())
    front = OpenAIFront(service, FrontOptions("127.0.0.1", "m"), PrometheusMeter("m"))
    transport = httpx.ASGITransport(refusing_app(front, Connections(0, 7)))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/v1/completions", json=BODY)

    response = asyncio.run(ask())
    assert (response.status_code, response.json()["error"]["code"]) == (429, "too_many_connections")
    assert "7 of one address" in response.json()["error"]["message"]
    assert (response.headers["retry-after"], response.headers["connection"]) == ("1", "close")
    assert b'reason="too_many_connections"} 1.0' in front.meter.render()[0]


def test_health_tells_whether_requests_are_taken() -> None:
    assert respond("GET", "/health").status_code == 200
    stopping = respond("GET", "/health", is_open=False)
    assert (stopping.status_code, stopping.json()) == (503, {"status": "stopping"})


def test_no_pages_that_describe_it() -> None:
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert respond("GET", path).status_code == 404


def test_browsers_get_no_leave_to_send_json() -> None:
    """What a page of another origin sends first; without an answer that allows it, its request is not sent."""
    asked = {
        "Origin": "http://evil.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    response = respond("OPTIONS", "/v1/completions", headers=asked)
    assert response.status_code == 405
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_origins_that_may_ask() -> None:
    asked = {"Origin": "http://good.example", "Access-Control-Request-Method": "POST"}
    response = respond("OPTIONS", "/v1/completions", headers=asked, origins=("http://good.example",))
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, "http://good.example")
    refused = respond(
        "OPTIONS",
        "/v1/completions",
        headers={**asked, "Origin": "http://evil.example"},
        origins=("http://good.example",),
    )
    assert "access-control-allow-origin" not in refused.headers


def test_headers_of_clients_in_browsers_are_allowed() -> None:
    """OpenAI's own client says what it runs on, in headers that it may add to."""
    asked = {
        "Origin": "http://good.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-arch,x-stainless-retry-count",
    }
    response = respond("OPTIONS", "/v1/chat/completions", headers=asked, origins=("http://good.example",))
    assert response.status_code == 200
    assert "x-stainless-retry-count" in response.headers["access-control-allow-headers"]


def test_ready_tells_of_a_full_queue() -> None:
    assert [respond("GET", "/ready", waiting=waiting).status_code for waiting in (4, 5)] == [200, 503]
    assert respond("GET", "/ready", is_open=False).json() == {"status": "stopping"}
    assert respond("HEAD", "/health").status_code == 200


def test_models_tokens_and_version() -> None:
    for path in ("/v1/models", "/v1/models/"):
        assert respond("GET", path).json()["data"][0]["max_model_len"] == 77
    told = respond("POST", "/tokenize", json={"prompt": "four", "return_token_strs": True}).json()
    assert told == {"count": 2, "max_model_len": 77, "tokens": [4, 9], "token_strs": ["<4>", "<9>"]}
    assert respond("POST", "/detokenize", json={"tokens": [1, 2]}).json() == {"prompt": "1 2"}
    assert respond("POST", "/detokenize", json={"tokens": "1"}).json()["error"]["param"] == "tokens"
    assert respond("POST", "/tokenize", json={"prompt": ""}).json()["count"] == 2
    assert respond("POST", "/tokenize", json={}).json()["error"]["param"] == "prompt"
    assert set(respond("GET", "/version").json()) == {"version"}


@pytest.mark.parametrize(
    ("given", "is_taken"), [("my-id.1", True), ("a b", False), ("x" * 129, False), ("a\\nb", False)]
)
def test_ids_of_requests(given: str, is_taken: bool) -> None:
    """Taken where they are harmless, else made, and in the answer to a refused request too."""
    shown = respond("POST", "/v1/completions", json={}, headers={"X-Request-Id": given}).headers["x-request-id"]
    assert (shown == given) == is_taken
    assert shown
