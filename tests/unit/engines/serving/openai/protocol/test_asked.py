"""Requests in our words."""

from __future__ import annotations

from typing import Any

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.engines.serving.grammar import Grammar
from medusa_export.engines.serving.openai.protocol.asked import read_asked
from medusa_export.engines.serving.openai.protocol.tools import CHOICES, read_choice, read_tools

TOOLS = read_tools("tools", [{"type": "function", "function": {"name": "f"}}])
USER = [{"role": "user", "content": "a"}]
SHAPE = Grammar("response_format", {"type": "object"})


def test_requests() -> None:
    asked = read_asked({"prompt": ["a"], "temperature": 0.5, "seed": -2, "stop": ("x",), "top_k": -1}, 7)
    (request,) = asked.requests
    assert (request.prompt, request.stop, request.sampling.temperature) == ("a", ("x",), 0.5)
    assert (request.sampling.max_tokens, request.sampling.seed, request.sampling.top_k) == (7, 2**64 - 2, 0)


@pytest.mark.parametrize(
    ("values", "limit"),
    [({"max_tokens": 3}, 3), ({"max_completion_tokens": 3}, 3), ({"max_tokens": 3, "max_completion_tokens": 5}, 3),
     ({"max_tokens": 9, "max_completion_tokens": 5}, 5), ({}, 7)],
)  # fmt: skip
def test_the_stricter_limit_wins(values: dict[str, Any], limit: int) -> None:
    assert read_asked({"prompt": ["a"], **values}, 7).requests[0].sampling.max_tokens == limit


def test_no_tokens_at_all() -> None:
    assert read_asked({"prompt": ["a"], "max_tokens": 0}, 7).requests[0].prompt_only
    assert not read_asked({"prompt": ["a"], "max_tokens": 1}, 7).requests[0].prompt_only


def test_several_answers_to_several_prompts() -> None:
    asked = read_asked({"prompt": ["a", (1, 2)], "n": 2, "seed": 5}, 7)
    assert [(request.prompt, request.prompt_ids) for request in asked.requests] == [
        ("a", ()),
        ("a", ()),
        ("", (1, 2)),
        ("", (1, 2)),
    ]
    assert [request.sampling.seed for request in asked.requests] == [5, 6, 5, 6]
    assert asked.per_prompt == 2


@pytest.mark.parametrize(
    ("values", "logprobs"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 3}, 3),
        ({"logprobs": 0}, 0),
    ],
)
def test_log_probabilities(values: dict[str, Any], logprobs: int | None) -> None:
    assert read_asked({"prompt": ["a"], **values}, 7).requests[0].sampling.logprobs == logprobs


def test_tools_are_told_to_the_model() -> None:
    asked = read_asked({"messages": USER, "tools": TOOLS}, 7)
    assert asked.calls_tools
    assert [message["role"] for message in asked.requests[0].messages] == ["system", "user"]
    assert '"name": "f"' in asked.requests[0].messages[0]["content"]
    told = (
        read_asked({"messages": [{"role": "system", "content": "be brief"}, *USER], "tools": TOOLS}, 7)
        .requests[0]
        .messages
    )
    assert told[0]["content"].startswith("be brief\n\n# Tools")
    silent = read_asked({"messages": USER, "tools": TOOLS, "tool_choice": CHOICES["none"]}, 7)
    assert (silent.requests[0].messages, silent.requests[0].grammar, silent.calls_tools) == (USER, None, False)


OTHER = read_choice("tool_choice", {"type": "function", "function": {"name": "g"}})


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"top_p": 0.0}, "top_p"),
        ({"tool_choice": CHOICES["required"]}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": OTHER}, "tool_choice"),
        ({"tools": TOOLS, "response_format": SHAPE}, "response_format"),
        ({"response_format": SHAPE, "min_tokens": 2}, "min_tokens"),
        ({"response_format": SHAPE, "ignore_eos": True}, "ignore_eos"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"min_tokens": 8}, "min_tokens"),
    ],
)
def test_contradictions(values: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_asked({"messages": USER, **values}, 7)
    assert refused.value.where == where


@pytest.mark.parametrize(
    ("values", "temperature"),
    [({}, 0), ({"n": 1, "top_p": 1.0, "top_k": -1, "min_p": 0.0}, 0), ({"n": 2}, 1), ({"top_p": 0.9}, 1), ({"top_k": 5}, 1),
     ({"top_k": 1}, 0), ({"min_p": 0.1}, 1), ({"n": 2, "temperature": 0.0}, 0), ({"top_p": 0.9, "temperature": 0.5}, 0.5),
     ({"seed": 3}, 0)],
)  # fmt: skip
def test_what_only_draws_can_give_is_drawn(values: dict[str, Any], temperature: float) -> None:
    """Several answers without a temperature would all be the same."""
    for request in read_asked({"prompt": ["a"], **values}, 7).requests:
        assert request.sampling.temperature == temperature
