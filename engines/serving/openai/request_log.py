"""Every request has an id, which its answer and its lines in the log bear; and every request gets its line."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from datetime import datetime, timezone
from typing import Any

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

HEADER = "X-Request-Id"
TAKEN = re.compile("[A-Za-z0-9._:-]{1,128}")  # ids of clients; others could forge lines of the log
PATH_LENGTH = 256  # of what a client asked for, in a line
# What a record has besides what it says; color_message is uvicorn's message once more, for terminals.
STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}
request_id: ContextVar[str] = ContextVar("request_id", default="")

logger = logging.getLogger(__name__)


class RequestLog:
    """An application around another one: takes or makes the request's id, and writes its line."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == HEADER.lower().encode()), b"")
        shown = given.decode("latin-1")
        name = shown if TAKEN.fullmatch(shown) else f"req-{secrets.token_hex(12)}"
        request_id.set(
            name
        )  # for good: the server, which has a task for each request, logs what is raised here with it
        start, status = time.monotonic(), 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (HEADER.encode(), name.encode())]}
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        finally:
            seconds = round(time.monotonic() - start, 4)
            client = (scope.get("client") or ("",))[0]
            facts = {
                "method": scope["method"][:PATH_LENGTH],
                "path": scope["path"][:PATH_LENGTH],
                "status": status,
                "seconds": seconds,
                "client": client,
            }
            logger.info("request", extra=facts)


class Formatter(logging.Formatter):
    """Lines with time, level and request id, and with what a record says besides its message.

    Args:
        as_json: a JSON object a line; otherwise text.
    """

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback follows in text, and is a field in JSON."""
        moment = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        facts: dict[str, Any] = {name: value for name, value in vars(record).items() if _is_said(name)}
        about, named = record.getMessage().strip(), request_id.get()
        traceback = self.formatException(record.exc_info) if record.exc_info else ""
        if self._as_json:
            more = {"traceback": traceback} if traceback else {}
            ids = {"request_id": named} if named else {}
            known = {"time": moment, "level": record.levelname, "logger": record.name, "message": about}
            return json.dumps({**known, **ids, **facts, **more}, default=str)
        said = " ".join([about, *(f"{name}={value}" for name, value in facts.items())])
        line = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in said)
        return " ".join(filter(None, [moment, record.levelname, named, line])) + (f"\n{traceback}" if traceback else "")


def _is_said(name: str) -> bool:
    """Whether a record's field came with the message; packages such as Ray mark every record with fields of their own."""
    return name not in STANDARD and not name.startswith("_")


def configure_logging(*, as_json: bool) -> None:
    """Format what the root logger writes."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(Formatter(as_json=as_json))
