"""Fields of OpenAI's protocol: what is honoured, what may pass because it changes nothing, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.engines.serving.openai.errors import UnknownFieldError, UnsupportedError
from medusa_export.engines.serving.openai.fields import CHAT, COMPLETIONS, Endpoint, read_body

BODIES: dict[str, tuple[Endpoint, dict[str, Any]]] = {
    "chat": (CHAT, {"model": "m", "messages": [{"role": "user", "content": "hi"}]}),
    "completions": (COMPLETIONS, {"model": "m", "prompt": "hi"}),
}


def neutral_values() -> list[Any]:
    return [
        pytest.param(name, field, value, id=f"{name}-{field}-{value}")
        for name, (endpoint, _) in BODIES.items()
        for field, values in endpoint.neutral.items()
        for value in (None, *values)
    ]


@pytest.mark.parametrize(("name", "field", "value"), neutral_values())
def test_values_that_change_nothing_pass(name: str, field: str, value: Any) -> None:
    endpoint, body = BODIES[name]
    assert field not in endpoint.readers
    assert endpoint.read({**body, field: value}).keys() == body.keys()


@pytest.mark.parametrize("name", BODIES)
def test_all_others_do_not(name: str) -> None:
    endpoint, body = BODIES[name]
    for field, neutral in endpoint.neutral.items():
        for value in (
            {"some": "thing"},
            ["some"],
            7,
            "some",
            -0.5,
            *(not item for item in neutral if type(item) is bool),
        ):
            if value in neutral:  # both values of parallel_tool_calls
                continue
            with pytest.raises(UnsupportedError) as refused:
                endpoint.read({**body, field: value})
            assert refused.value.where == field


@pytest.mark.parametrize("value", [True, 1.0, "1"])
def test_only_the_number_is_the_number(value: object) -> None:
    with pytest.raises(UnsupportedError):
        CHAT.read({**BODIES["chat"][1], "n": value})


def test_protocols_of_the_installed_client_are_covered() -> None:
    """A field that the client has and the tables do not would be called unknown; it would be refused all the same."""
    from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatParams
    from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as TextParams

    for params, endpoint in ((ChatParams, CHAT), (TextParams, COMPLETIONS)):
        known = endpoint.readers.keys() | endpoint.neutral.keys()
        fields = set(get_type_hints(params))
        assert len(fields) > 10
        assert fields - known == set()


def test_values_are_read() -> None:
    body = {
        "model": "m", "messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        "temperature": 1, "stop": "x", "stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False},
        "seed": None,
    }  # fmt: skip
    values = CHAT.read(body)
    assert values["messages"] == [{"role": "system", "content": "ab"}]
    assert (values["temperature"], values["stop"], values["stream_options"]) == (1.0, ("x",), True)
    assert "seed" not in values
    assert COMPLETIONS.read({"model": "m", "prompt": ["hi"]})["prompt"] == "hi"


@pytest.mark.parametrize(
    ("change", "error", "where"),
    [
        ({"messages": [{"role": "user", "content": "a", "weight": 1}]}, UnknownFieldError, "messages[0].weight"),
        ({"messages": [{"role": "user", "content": "a", "name": "me"}]}, UnsupportedError, "messages[0].name"),
        ({"messages": [{"role": "assistant", "content": None}]}, ConfigError, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, ConfigError, "messages[0].content[0].text"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, ConfigError, "messages[0].role"),
        ({"messages": {"role": "user"}}, ConfigError, "messages"),
        ({"stream_options": {"include_all": True}}, UnknownFieldError, "stream_options.include_all"),
        ({"stream_options": {"include_obfuscation": True}}, UnsupportedError, "stream_options.include_obfuscation"),
        ({"stream_options": True}, ConfigError, "stream_options"),
        ({"stop": [1]}, ConfigError, "stop"),
        ({"temperature": "1"}, ConfigError, "temperature"),
        ({"temperature": True}, ConfigError, "temperature"),
        ({"model": None}, ConfigError, "model"),
        ({"y" * 1000: 1}, UnknownFieldError, "y" * 64),
    ],
)
def test_what_is_refused_is_named(change: dict[str, Any], error: type[ConfigError], where: str) -> None:
    with pytest.raises(error) as refused:
        CHAT.read({**BODIES["chat"][1], **change})
    assert (type(refused.value), refused.value.where) == (error, where)
    assert len(str(refused.value)) < 300


def test_bodies() -> None:
    assert read_body(json.dumps({"é": 1}, ensure_ascii=False).encode()) == {"é": 1}
    assert read_body(b'{"a": 1e999}') == {"a": float("inf")}  # readers of numbers have ranges
    for data in (b"", b"{", b"[1]", b"null", b"\xff", b'{"a": NaN}', b'{"a": -Infinity}', b"[" * 100_000, b"9" * 5000):
        with pytest.raises(ConfigError) as refused:
            read_body(data)
        assert refused.value.where == "body"
