"""Lines of the log: one a record, with time, level and request id, as text or JSON."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime

from medusa_export.engines.serving.openai.request_log import Formatter, request_id


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
