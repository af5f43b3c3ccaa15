"""Tools as text, in the words of Hermes (NousResearch), which many models were trained on: said to the model, and read from it.

A model that calls a tool writes ``<tool_call>`` and JSON. The grammar of an answer sees to it that the JSON fits the tool's schema.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from medusa_export.core.errors import ConfigError
from medusa_export.engines.serving.grammar import JSON_OPTIONS, Grammar
from medusa_export.engines.serving.openai.protocol.readers import unsupported, wrong

OPEN, CLOSE = "<tool_call>", "</tool_call>"
NAME = re.compile("[A-Za-z0-9_-]{1,64}")
MOST_TOOLS = 128
SCHEMA_MAPS, SCHEMA_LISTS = ("properties", "$defs", "definitions"), ("anyOf", "oneOf", "prefixItems")
# What may give an object keys besides its properties.
OPENING = ("additionalProperties", "patternProperties", "unevaluatedProperties", "anyOf", "oneOf", "$ref")
INSTRUCTIONS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True)
class Tool:
    """A function that a client offers.

    Attributes:
        parameters: the JSON schema of its arguments.
        body: as the client says it.
    """

    name: str
    parameters: dict[str, Any]
    body: dict[str, Any]


@dataclass(frozen=True)
class ToolChoice:
    """Which tools an answer may, or has to, call.

    Attributes:
        is_required: it has to call one.
        name: the only one that it may call.
    """

    is_none: bool = False
    is_required: bool = False
    name: str | None = None


CHOICES = {"none": ToolChoice(is_none=True), "auto": ToolChoice(), "required": ToolChoice(is_required=True)}


def read_tools(name: str, value: Any) -> list[Tool]:
    """The field ``tools``."""
    if not isinstance(value, list) or len(value) > MOST_TOOLS:
        raise wrong(name, value, f"a list of at most {MOST_TOOLS} tools")
    return [_tool(f"{name}[{index}]", item) for index, item in enumerate(value)]


def _tool(name: str, value: Any) -> Tool:
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise wrong(name, value, '{"type": "function", "function": {"name": ...}}')
    if value["type"] != "function":
        raise unsupported(f"{name}.type", value["type"], '"function"')
    function = value.get("function")
    if not isinstance(function, dict):
        raise wrong(f"{name}.function", function, '{"name": ...}')
    if not isinstance(function.get("name"), str) or not NAME.fullmatch(function["name"]):
        raise wrong(f"{name}.function.name", function.get("name"), "at most 64 letters, digits, _ and -")
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    if not isinstance(parameters, dict):
        raise wrong(f"{name}.function.parameters", parameters, "a JSON schema")
    return Tool(function["name"], parameters, {"type": "function", "function": function})


def read_choice(name: str, value: Any) -> ToolChoice:
    """The field ``tool_choice``."""
    if isinstance(value, str) and value in CHOICES:
        return CHOICES[value]
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        return ToolChoice(is_required=True, name=function["name"])
    raise wrong(name, value, f'one of {", ".join(CHOICES)}, or {{"type": "function", "function": {{"name": ...}}}}')


def with_tools(messages: Sequence[dict[str, str]], tools: Sequence[Tool]) -> list[dict[str, str]]:
    """A conversation in which the model is told of tools, at the end of the first system message."""
    said = INSTRUCTIONS.format(tools="\n".join(json.dumps(tool.body, ensure_ascii=False) for tool in tools))
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{messages[0]['content']}\n\n{said}"}, *messages[1:]]
    return [{"role": "system", "content": said}, *messages]


def call_text(name: str, calls: Any, *, has_text: bool) -> str:
    """The calls of an earlier answer, as the model wrote them.

    Args:
        name: of the field.
        calls: what it holds.
        has_text: whether text comes before the calls.
    """
    if not isinstance(calls, list):
        raise wrong(name, calls, "a list of calls")
    texts = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not all(
            isinstance(function.get(key), str) for key in ("name", "arguments")
        ):
            raise wrong(f"{name}[{index}]", call, '{"function": {"name": ..., "arguments": ...}}')
        texts.append(
            f'{OPEN}\n{{"name": {json.dumps(function["name"])}, "arguments": {function["arguments"]}}}\n{CLOSE}'
        )
    return "\n" * (has_text and bool(texts)) + "\n".join(texts)


def response_text(said: str) -> str:
    """What a tool gave back."""
    return f"<tool_response>\n{said}\n</tool_response>"


def tool_grammar(tools: Sequence[Tool], choice: ToolChoice, *, parallel: bool) -> Grammar:
    """What an answer that may, or has to, call tools looks like.

    Args:
        tools: that are offered.
        choice: which of them, and whether one has to be called.
        parallel: whether several may be called.

    Raises:
        ConfigError: a tool that was not offered.
    """
    offered = [tool for tool in tools if choice.name in (None, tool.name)]
    if not offered:
        raise ConfigError("tool_choice", f"{str(choice.name)[:64]!r}", "a tool of tools", "correct the request")
    if choice.is_required:
        start = "start: call" + (' ("\\n" call)*' if parallel and choice.name is None else "")
        heads = ["call: " + " | ".join(f"call_{index}" for index in range(len(offered)))]
        opening = json.dumps(OPEN + "\n")
    else:  # text, in which the tag of a call has to be followed by one
        calls = " | ".join(f"call_{index}" for index in range(len(offered)))
        start = f"start: ({calls})* TEXT" if parallel else f"start: {calls} | TEXT"
        heads = [r"TEXT: /(.|\n)*/", f"open[lazy]: TEXT {json.dumps(OPEN)}"]
        opening = 'open "\\n"'
    lines = ["%llguidance {}", start, *heads]
    for index, tool in enumerate(offered):
        before = json.dumps(f'{{"name": {json.dumps(tool.name)}, "arguments": ')
        schema = json.dumps({**closed(tool.parameters), "x-guidance": JSON_OPTIONS})
        lines.append(f"call_{index}: {opening} {before} args_{index} {json.dumps('}' + chr(10) + CLOSE)}")
        lines.append(f"args_{index}: %json {schema}")
    return Grammar("tools", lark="\n".join(lines) + "\n")


def closed(parameters: dict[str, Any]) -> dict[str, Any]:
    """A schema whose objects have no other keys than their own, unless it says otherwise.

    A model may make up keys for ever where any are allowed. With ``allOf`` it stays as it is: its parts would exclude each other.
    """
    made: dict[str, Any] = parameters if '"allOf":' in json.dumps(parameters) else _closed(parameters)
    return made


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for key in SCHEMA_MAPS:
        if isinstance(schema.get(key), dict):
            made[key] = {name: _closed(value) for name, value in schema[key].items()}
    if "properties" in schema:
        if not any(key in schema for key in OPENING):
            made["additionalProperties"] = False
        return made
    for key in SCHEMA_LISTS:
        if isinstance(schema.get(key), list):
            made[key] = [_closed(value) for value in schema[key]]
    for key in ("items", "additionalProperties"):
        if key in schema:
            made[key] = _closed(schema[key])
    return made


@dataclass
class ToolParser:
    """Splits an answer as it comes into text and calls. Text that may be the beginning of a call is held back."""

    calls: int = 0
    _held: str = ""
    _is_behind_call: bool = False  # blanks there part calls, and are no text

    def feed(self, text: str, *, is_last: bool) -> tuple[str, list[dict[str, Any]]]:
        """New text of an answer, and its complete new calls, as the protocol words them.

        Args:
            is_last: no more comes; a call that was cut off is dropped then.
        """
        self._held += text
        said, calls = "", list[dict[str, Any]]()
        while True:
            before, opened, rest = self._held.partition(OPEN)
            if not opened:
                held = _overlap(self._held, OPEN)
                held = 0 if is_last and held == 1 else held  # a lone < is text
                said += self._text(self._held[: len(self._held) - held])
                self._held = self._held[len(self._held) - held :]
                break
            body, ends, after = rest.partition(CLOSE)
            if not ends:
                said, self._held = said + self._text(before), opened + rest
                break
            call = self._call(body)
            said += self._text(before if call else before + opened + body + ends)
            calls += [call] if call else []
            self._is_behind_call = call is not None
            self._held = after
        return said, calls

    def _text(self, text: str) -> str:
        text = text.lstrip() if self._is_behind_call else text
        self._is_behind_call = self._is_behind_call and not text
        return text

    def _call(self, body: str) -> dict[str, Any] | None:
        try:
            found = json.loads(body)
            name, arguments = found["name"], found["arguments"]
        except (ValueError, KeyError, TypeError):
            return None
        index, self.calls = self.calls, self.calls + 1
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        return {"index": index, "id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of a text that is the beginning of a word."""
    return next((size for size in range(min(len(text), len(word) - 1), 0, -1) if word.startswith(text[-size:])), 0)
