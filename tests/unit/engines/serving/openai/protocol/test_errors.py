"""Errors in OpenAI's words: the right status for each, and nothing of what is inside."""

from __future__ import annotations

import pytest

from medusa_export.core.errors import CheckpointError, ConfigError, MedusaExportError
from medusa_export.engines.serving.grammar import GrammarError
from medusa_export.engines.serving.openai.protocol.errors import (
    END_MESSAGES,
    REFUSALS,
    UnfinishedError,
    UnsupportedError,
    body_of,
    refusal_of,
    require_answer,
)
from medusa_export.engines.serving.request import BusyError, ClosedError, FinishInfo, PromptError
from tests.paths import assert_golden


@pytest.mark.parametrize(
    ("error", "status", "code", "param"),
    [
        (ConfigError("seed", "x", "y", "z"), 400, "invalid_value", "seed"),
        (UnsupportedError("n", "2", "1", "z"), 400, "unsupported_parameter", "n"),
        (PromptError("messages", 9, 8), 400, "context_length_exceeded", "messages"),
        (BusyError("server", "x", "y", "z"), 429, "server_busy", None),
        (ClosedError("server", "x", "y", "z"), 503, "server_stopping", None),
        (ConfigError("\ud800", "x", "y", "z"), 400, "invalid_value", None),
    ],
)
def test_statuses(error: MedusaExportError, status: int, code: str, param: str | None) -> None:
    body = body_of(error)["error"]
    assert (refusal_of(error).status, body["code"], body["param"], body["message"]) == (status, code, param, str(error))
    assert ("Retry-After" in refusal_of(error).headers) == (status in (429, 503))


def test_a_grammar_that_cannot_be_followed_is_the_clients() -> None:
    error = GrammarError("response_format", "a matcher that gave up (x)", "one that goes on", "use a simpler schema")
    with pytest.raises(GrammarError) as raised:
        require_answer(FinishInfo("error", 1, 2, 3, 4.0, error))
    assert (refusal_of(raised.value).status, body_of(raised.value)["error"]["param"]) == (400, "response_format")


def test_the_body_is_what_was_kept() -> None:
    assert_golden("openai/error.json", body_of(PromptError("messages", 9, 8)))


def test_no_rule_hides_another() -> None:
    """The first rule whose class an error has decides: a base class before its subclass would take its errors."""
    for kind, refusal in REFUSALS.items():
        error = PromptError("a", 9, 8) if kind is PromptError else kind("a", "b", "c", "d")
        assert refusal_of(error) is refusal


def test_a_full_context_is_told_in_the_words_that_clients_know() -> None:
    assert (
        "This model's maximum context length is 8 tokens" in body_of(PromptError("messages", 9, 8))["error"]["message"]
    )


def test_what_is_ours_stays_inside() -> None:
    body = body_of(CheckpointError("/secret/path", "x", "y", "z"))["error"]
    assert body == {"message": END_MESSAGES["error"], "type": "server_error", "param": None, "code": "internal_error"}


def test_ends() -> None:
    for reason, status in (("timeout", 504), ("closed", 503), ("error", 500), ("cancelled", 499)):
        with pytest.raises(UnfinishedError) as unfinished:
            require_answer(FinishInfo(reason, 1, 2, 3, 4.0, RuntimeError("/secret/path")))
        assert refusal_of(unfinished.value).status == status
        assert body_of(unfinished.value)["error"]["message"] == END_MESSAGES[reason]
    for reason in ("stop", "length"):
        require_answer(FinishInfo(reason, 1, 2, 3, 4.0))
    require_answer(None)
