"""Failures of our own reach clients as such and no further; the text service is a stand-in."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from medusa_export.core.errors import CheckpointError, MedusaExportError
from medusa_export.engines.serving.openai.app import build_app
from medusa_export.engines.serving.openai.front import FrontOptions, OpenAIFront
from medusa_export.engines.serving.openai.prometheus import PrometheusMeter
from medusa_export.engines.serving.options import ServingOptions

BODY = {"model": "m", "prompt": "hi"}


def respond(
    method: str, path: str, error: Exception | None = None, *, is_open: bool = True, **options: Any
) -> httpx.Response:
    """The application's response, without a socket."""

    def submit(*_: object) -> None:
        assert error is not None
        raise error

    scheduler = SimpleNamespace(decoder=SimpleNamespace(slots=1), is_open=is_open)
    service: Any = SimpleNamespace(options=ServingOptions(), scheduler=scheduler, submit=submit)
    front = OpenAIFront(service, FrontOptions("127.0.0.1", "m"))
    transport = httpx.ASGITransport(build_app(front, PrometheusMeter("m")), raise_app_exceptions=False)

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
