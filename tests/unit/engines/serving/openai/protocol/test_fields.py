"""Fields of OpenAI's protocol: what is honoured, what may pass because it changes nothing, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any, get_type_hints

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.engines.serving.openai.prometheus import PrometheusMeter
from medusa_export.engines.serving.openai.protocol.errors import UnknownFieldError, UnsupportedError
from medusa_export.engines.serving.openai.protocol.fields import CHAT, COMPLETIONS, Endpoint, StreamOptions
from medusa_export.engines.serving.openai.protocol.readers import read_body

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
    values, passed_over = endpoint.read({**body, field: value}, strict=True)
    assert (values.keys(), passed_over) == (body.keys(), [])


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
            if value in neutral:
                continue
            with pytest.raises(UnsupportedError) as refused:
                endpoint.read({**body, field: value})
            assert refused.value.where == field


@pytest.mark.parametrize("value", [True, 1.0, "1"])
def test_only_the_number_is_the_number(value: object) -> None:
    with pytest.raises(UnsupportedError):
        CHAT.read({**BODIES["chat"][1], "best_of": value})


def test_protocols_of_the_installed_client_are_covered() -> None:
    """A field that the client has and the tables do not would be called unknown; it would be refused all the same."""
    from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as ChatParams
    from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as TextParams

    for params, endpoint in ((ChatParams, CHAT), (TextParams, COMPLETIONS)):
        known = {*endpoint.readers, *endpoint.neutral, *endpoint.silent, *endpoint.nested}
        fields = set(get_type_hints(params))
        assert len(fields) > 10
        assert fields - known == set()


def test_values_are_read() -> None:
    body = {
        "model": "m", "messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        "temperature": 1, "stop": "x", "stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False},
        "seed": None,
    }  # fmt: skip
    values, passed_over = CHAT.read(body, strict=True)
    assert values["messages"] == [{"role": "system", "content": "ab"}]
    assert (values["temperature"], values["stop"], values["stream_options"]) == (1.0, ("x",), StreamOptions(usage=True))
    assert "seed" not in values
    assert passed_over == []
    for prompt, read in (("hi", ["hi"]), (["a", "b"], ["a", "b"]), ([1, 2], [(1, 2)]), ([[1], [2, 3]], [(1,), (2, 3)])):
        assert COMPLETIONS.read({"model": "m", "prompt": prompt})[0]["prompt"] == read


def test_what_others_know_and_we_do_not_is_passed_over() -> None:
    message = {"role": "user", "content": "a", "name": "me", "weight": 1}
    body = {**BODIES["chat"][1], "messages": [message], "foo": 1, "bar": None, "stream_options": {"include_all": True}}
    values, passed_over = CHAT.read(body)
    assert passed_over == ["messages.name", "messages.weight", "foo", "bar", "stream_options.include_all"]
    assert "foo" not in values
    for field in ("foo", "stream_options", "messages"):
        with pytest.raises(UnknownFieldError):
            CHAT.read({**BODIES["chat"][1], field: body[field]}, strict=True)


@pytest.mark.parametrize("name", BODIES)
def test_what_asks_for_nothing_is_not_passed_over(name: str) -> None:
    endpoint, body = BODIES[name]
    said = {field: {"any": "thing"} for field in endpoint.silent}
    assert endpoint.read({**body, **said, "user": "me"}, strict=True)[1] == []


def test_names_that_are_passed_over_can_be_told() -> None:
    """They become a label of a metric and a line of the log, which cannot hold everything that JSON can spell."""
    bad = "\ud800\n\x00" + "x" * 10_000
    body = {
        **BODIES["chat"][1],
        "messages": [{"role": "user", "content": "a", bad: 1}],
        bad: 1,
        "stream_options": {bad: True},
    }
    names = CHAT.read(body)[1]
    meter = PrometheusMeter("m")
    assert len(names) == 3
    assert all(name.isprintable() and len(name) <= 80 and "\\xd800" in name for name in names)
    assert all(meter.passed_over(name) for name in names)
    assert b"xd800" in meter.render()[0]


@pytest.mark.parametrize(
    "field",
    ["max_new_tokens", "num_predict", "n_predict", "stop_sequences", "grammar", "regex", "json_schema", "repeat_penalty",
     "min_length", "num_beams", "no_repeat_ngram_size", "suppress_tokens", "bad_words_ids", "dry_multiplier", "xtc_probability",
     "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"],
)  # fmt: skip
def test_names_that_others_have_for_it_are_refused(field: str) -> None:
    for endpoint, body in BODIES.values():
        with pytest.raises(UnsupportedError) as refused:
            endpoint.read({**body, field: [9]})
        assert refused.value.where == field


def test_hints_are_passed_over() -> None:
    body = {**BODIES["chat"][1], "reasoning_effort": "high", "verbosity": "low"}
    assert CHAT.read(body)[1] == ["reasoning_effort", "verbosity"]
    assert CHAT.read({**body, "reasoning_effort": "none", "verbosity": "medium"}, strict=True)[1] == []
    with pytest.raises(ConfigError, match="reasoning_effort"):
        CHAT.read({**body, "reasoning_effort": "immense"})


def test_what_clients_send_back() -> None:
    messages = [
        {"role": "user", "content": ""}, {"role": "tool", "tool_call_id": "1", "content": None},
        {"role": "assistant", "content": "so", "reasoning_content": "hm", "reasoning": "hm", "annotations": [{"type": "link"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "assistant", "content": None, "refusal": "never"},
    ]  # fmt: skip
    values, passed_over = CHAT.read({**BODIES["chat"][1], "messages": messages}, strict=True)
    assert [message["content"] for message in values["messages"]] == [
        "", "<tool_response>\n\n</tool_response>", "so", "no", "never",
    ]  # fmt: skip
    assert passed_over == []


def test_messages_of_assistants_and_tools() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "7"},
        {"role": "assistant", "content": ""}, {"role": "assistant", "content": "so", "tool_calls": [call]},
    ]  # fmt: skip
    said = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert CHAT.read({**BODIES["chat"][1], "messages": messages})[0]["messages"] == [
        {"role": "assistant", "content": said}, {"role": "user", "content": "<tool_response>\n7\n</tool_response>"},
        {"role": "assistant", "content": ""}, {"role": "assistant", "content": f"so\n{said}"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "where"),
    [
        ({"messages": [{"role": "user", "content": None}]}, ConfigError, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a", "audio": {"id": 1}}]}, UnsupportedError, "messages[0].audio"),
        ({"messages": [{"role": "user", "content": "a", "refusal": "no"}]}, UnsupportedError, "messages[0].refusal"),
        ({"chat_template_kwargs": "x"}, ConfigError, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, ConfigError, "messages[0].tool_calls"),
        ({"response_format": {"type": "xml"}}, UnsupportedError, "response_format"),
        ({"response_format": {"type": "json_schema"}}, ConfigError, "response_format.json_schema.schema"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, ConfigError, "tools[0].function.name"),
        ({"tools": [{"type": "browser"}]}, UnsupportedError, "tools[0].type"),
        ({"tool_choice": "some"}, ConfigError, "tool_choice"),
        ({"logit_bias": {"a": 1}}, ConfigError, "logit_bias"),
        ({"logit_bias": {"1": 101}}, ConfigError, "logit_bias.1"),
        ({"n": 0}, ConfigError, "n"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, ConfigError, "messages[0].content[0].text"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, ConfigError, "messages[0].role"),
        ({"messages": {"role": "user"}}, ConfigError, "messages"),
        ({"stream_options": True}, ConfigError, "stream_options"),
        ({"stop": [1]}, ConfigError, "stop"),
        ({"temperature": "1"}, ConfigError, "temperature"),
        ({"temperature": True}, ConfigError, "temperature"),
        ({"model": None}, ConfigError, "model"),
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
