"""Errors as OpenAI's protocol words them: one table from what went wrong to a status, a type and a code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from medusa_export.core.errors import ConfigError, MedusaExportError, MissingPackageError
from medusa_export.engines.serving.grammar import GrammarError
from medusa_export.engines.serving.request import BusyError, ClosedError, FinishInfo, PromptError


class UnsupportedError(ConfigError):
    """A field of the protocol that this server does not honour."""


class UnknownFieldError(ConfigError):
    """A field that the protocol does not have."""


class UnknownModelError(ConfigError):
    """Another model than the one that is served."""


class KeyRefusedError(ConfigError):
    """No key, or a wrong one."""


class HostRefusedError(ConfigError):
    """A request that was meant for another host, as a web page's may be."""


class MediaTypeError(ConfigError):
    """A body that does not say that it is JSON: what web pages can send without asking."""


class BodySizeError(ConfigError):
    """A body beyond the limit."""


class SlowBodyError(ConfigError):
    """A body that does not come."""


class FramingError(ConfigError):
    """A body whose end two headers tell differently."""


class ConnectionsError(MedusaExportError):
    """A connection too many."""


class UnfinishedError(MedusaExportError):
    """A request that ended without its answer."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__("request", END_MESSAGES[reason], "an answer", "try again")

    def __str__(self) -> str:
        return END_MESSAGES[self.reason]


END_MESSAGES = {  # how a request can end without an answer, and what the client reads
    "cancelled": "the request was cancelled",
    "timeout": "the request took longer than its time limit",
    "closed": "the server is stopping",
    "error": "the server failed at this request",
}


@dataclass(frozen=True)
class Refusal:
    """What a client gets instead of an answer.

    Attributes:
        type, code: what the protocol calls it.
    """

    status: int
    type: str
    code: str
    headers: Mapping[str, str] = field(default_factory=dict)


_INVALID, _LATER = "invalid_request_error", {"Retry-After": "1"}
REFUSALS: dict[type[MedusaExportError], Refusal] = {  # of a subclass before that of its base
    UnsupportedError: Refusal(400, _INVALID, "unsupported_parameter"),
    UnknownFieldError: Refusal(400, _INVALID, "unknown_parameter"),
    UnknownModelError: Refusal(404, _INVALID, "model_not_found"),
    KeyRefusedError: Refusal(401, _INVALID, "invalid_api_key", {"WWW-Authenticate": "Bearer"}),
    HostRefusedError: Refusal(403, _INVALID, "host_not_allowed"),
    MediaTypeError: Refusal(415, _INVALID, "unsupported_media_type"),
    BodySizeError: Refusal(413, _INVALID, "request_too_large"),
    SlowBodyError: Refusal(408, _INVALID, "request_timeout"),
    PromptError: Refusal(400, _INVALID, "context_length_exceeded"),
    MissingPackageError: Refusal(400, _INVALID, "unsupported_parameter"),
    FramingError: Refusal(400, _INVALID, "bad_framing", {"Connection": "close"}),
    ConnectionsError: Refusal(429, "rate_limit_error", "too_many_connections", {**_LATER, "Connection": "close"}),
    BusyError: Refusal(429, "rate_limit_error", "server_busy", _LATER),
    ClosedError: Refusal(503, "server_error", "server_stopping", _LATER),
    ConfigError: Refusal(400, _INVALID, "invalid_value"),
}
_NO_RETRY = {"x-should-retry": "false"}  # what OpenAI's clients heed
UNFINISHED: dict[str, Refusal] = {
    "cancelled": Refusal(499, "server_error", "cancelled"),
    "timeout": Refusal(504, "server_error", "timeout", _NO_RETRY),
    "closed": Refusal(503, "server_error", "server_stopping", _LATER),
    "error": Refusal(500, "server_error", "internal_error", _NO_RETRY),
}
INTERNAL = UNFINISHED["error"]


def require_answer(end: FinishInfo | None) -> None:
    """Raise UnfinishedError where a request ended without its answer, GrammarError where its own grammar was why."""
    if end is not None and isinstance(end.error, GrammarError):
        raise end.error
    if end is not None and end.reason in END_MESSAGES:
        raise UnfinishedError(end.reason)


def refusal_of(error: MedusaExportError) -> Refusal:
    """The status and words of an error."""
    if isinstance(error, UnfinishedError):
        return UNFINISHED[error.reason]
    return next((refusal for kind, refusal in REFUSALS.items() if isinstance(error, kind)), INTERNAL)


def error_body(refusal: Refusal, message: str, param: str | None = None) -> dict[str, Any]:
    """The body that OpenAI's clients read.

    Args:
        refusal: status, type and code.
        message: for people.
        param: field that is wrong, where one is.
    """
    return {"error": {"message": message, "type": refusal.type, "param": param, "code": refusal.code}}


def body_of(error: MedusaExportError) -> dict[str, Any]:
    """The body of an error; what is ours and not the request's stays in the log."""
    refusal = refusal_of(error)
    if refusal is INTERNAL:
        return error_body(refusal, END_MESSAGES["error"])
    has_param = refusal.status == 400 and error.where.isprintable()
    return error_body(refusal, str(error), error.where if has_param else None)
