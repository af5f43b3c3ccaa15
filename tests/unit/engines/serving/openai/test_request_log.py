"""Lines of the log: one a record, with time, level and request id, as text or JSON."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from datetime import datetime
from typing import Any

import pytest

from medusa_export.engines.serving.openai.request_log import PATH_LENGTH, Formatter, RequestLog, request_id


def record(**more: object) -> logging.LogRecord:
    return logging.makeLogRecord(
        {"name": "a.b", "levelname": "INFO", "msg": "said %s", "args": ("x\nERROR y",), **more}
    )


def test_text() -> None:
    token = request_id.set("req-1")
    line = Formatter(as_json=False).format(record(status=200, _ray_timestamp_ns=1))
    request_id.reset(token)
    moment, rest = line.split(" ", 1)
    assert datetime.fromisoformat(moment).tzinfo is not None
    assert rest == "INFO req-1 said x\\x0aERROR y status=200"


def test_json() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        failed = record(exc_info=sys.exc_info(), path=["no", "JSON", object])
    token = request_id.set("req-2")
    told = json.loads(Formatter(as_json=True).format(failed))
    request_id.reset(token)
    assert {name: told[name] for name in ("level", "logger", "request_id", "message")} == {
        "level": "INFO", "logger": "a.b", "request_id": "req-2", "message": "said x\nERROR y",
    }  # fmt: skip
    assert "ValueError: why" in told["traceback"]
    assert "request_id" not in json.loads(Formatter(as_json=True).format(record()))


def test_what_uvicorn_says_twice_is_said_once() -> None:
    assert "colour" not in Formatter(as_json=False).format(record(color_message="colour %s"))


def test_what_a_server_logs_of_a_failure_has_the_id(caplog: pytest.LogCaptureFixture) -> None:
    """The server logs it in the request's task, when it is out of the application."""

    async def fail(*_: object) -> None:
        raise RuntimeError("why")

    lines: list[dict[str, Any]] = []

    async def serve(path: str) -> None:
        scope = {"type": "http", "method": "GET", "path": path, "headers": [(b"x-request-id", b"mine")]}
        try:
            await RequestLog(fail)(scope, None, None)
        except RuntimeError:
            said = Formatter(as_json=True).format(record(msg="Exception in ASGI application", args=()))
            lines.append(json.loads(said))

    async def serve_in_tasks() -> None:
        await asyncio.gather(asyncio.create_task(serve("/" + "a" * 9999)))
        assert request_id.get() == ""

    with caplog.at_level(logging.INFO):
        asyncio.run(serve_in_tasks())
    assert [line["request_id"] for line in lines] == ["mine"]
    assert len(vars(caplog.records[-1])["path"]) == PATH_LENGTH
