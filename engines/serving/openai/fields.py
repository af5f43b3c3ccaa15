"""What requests of OpenAI's protocol may say, in one table: a field is taken or refused by name, none is passed over."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from medusa_export.core.errors import ConfigError
from medusa_export.engines.serving.openai.errors import UnknownFieldError, UnsupportedError

Reader = Callable[[str, Any], Any]  # name and JSON value -> value; raises ConfigError

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
NAME_LENGTH = 64  # of names that a client made up, in what it is told
EMPTY_IN_MESSAGES = (
    "name",
    "refusal",
    "audio",
    "annotations",
    "tool_calls",
    "function_call",
)  # as clients send answers back


def _wrong(name: str, value: object, expected: str) -> ConfigError:
    return ConfigError(name, reprlib.repr(value), expected, "correct the request")


def _unknown(name: str, key: str, expected: str) -> UnknownFieldError:
    where = f"{name}.{key[:NAME_LENGTH]}" if name else key[:NAME_LENGTH]
    return UnknownFieldError(where, "a field of that name", expected, "leave it out")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(name, value, "text")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _whole(least: int, most: float = math.inf) -> Reader:
    expected = f"a whole number, {least} or more" if most == math.inf else f"a whole number, {least} .. {most}"

    def read(name: str, value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise _wrong(name, value, expected)
        return value

    return read


def _number(least: float, most: float) -> Reader:
    def read(name: str, value: Any) -> float:
        if type(value) not in (int, float) or not least <= value <= most:
            raise _wrong(name, value, f"a number, {least:g} .. {most:g}")
        return float(value)

    return read


def _stop(name: str, value: Any) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise _wrong(name, value, "text, or a list of texts, none of them empty")
    return tuple(words)


def _stream_options(name: str, value: Any) -> bool:
    """Whether the usage is wanted."""
    known = {"include_usage": None, "include_obfuscation": (False,)}
    if not isinstance(value, dict):
        raise _wrong(name, value, '{"include_usage": true}')
    for key, item in value.items():
        if key not in known:
            raise _unknown(name, key, "include_usage")
        allowed = known[key]
        if allowed is not None and item is not None:
            _require_neutral(f"{name}.{key}", item, allowed)
    return _flag(f"{name}.include_usage", value.get("include_usage") or False)


def _prompt(name: str, value: Any) -> str:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return value[0]
    if isinstance(value, list):
        raise UnsupportedError(
            name, reprlib.repr(value), "one text", "send a request for each; token ids are not taken"
        )
    return _text(name, value)


def _messages(name: str, value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise _wrong(name, value, "a list of messages")
    return [_message(f"{name}[{index}]", message) for index, message in enumerate(value)]


def _message(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _wrong(name, value, '{"role": ..., "content": ...}')
    for key, item in value.items():
        if key in EMPTY_IN_MESSAGES:
            if item not in (None, [], ""):
                raise UnsupportedError(f"{name}.{key}", reprlib.repr(item), "nothing", "leave it out")
        elif key not in ("role", "content"):
            raise _unknown(name, key, "role and content")
    role = value.get("role")
    if role in ("tool", "function"):
        raise UnsupportedError(f"{name}.role", repr(role), f"one of {', '.join(ROLES)}", "there are no tools here")
    if not isinstance(role, str) or role not in ROLES:
        raise _wrong(f"{name}.role", role, f"one of {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": _content(f"{name}.content", value.get("content"))}


def _content(name: str, value: Any) -> str:
    """Text, or the text of all parts."""
    if not isinstance(value, list):
        return _text(name, value)
    return "".join(_part(f"{name}[{index}]", part) for index, part in enumerate(value))


def _part(name: str, value: Any) -> str:
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise _wrong(name, value, '{"type": "text", "text": ...}')
    if value["type"] != "text":
        raise UnsupportedError(f"{name}.type", reprlib.repr(value["type"]), "text", "this model reads text alone")
    return _text(f"{name}.text", value.get("text"))


@dataclass(frozen=True)
class Endpoint:
    """One of the protocol's two ways to ask.

    Attributes:
        content: the field with what is asked.
        readers: fields that are honoured.
        neutral: fields that are not, with the values that change nothing; null is one of them.
    """

    content: str
    readers: Mapping[str, Reader]
    neutral: Mapping[str, tuple[Any, ...]]

    def read(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a request, by field; absent ones and null are left out.

        Raises:
            ConfigError: a value of another type or out of range.
            UnsupportedError: a field that would have to be passed over.
            UnknownFieldError: none of the protocol's.
        """
        values = {}
        for name, value in body.items():
            if name not in self.readers and name not in self.neutral:
                raise _unknown("", name, "one of the protocol's")
            if value is None:
                continue
            if name in self.readers:
                values[name] = self.readers[name](name, value)
            else:
                _require_neutral(name, value, self.neutral[name])
        for name in ("model", self.content):
            if name not in values:
                raise ConfigError(name, "nothing", "a value", "add it to the request")
        return values


def _require_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    if not any(type(value) is type(item) and value == item for item in neutral):
        expected = " or ".join(["nothing", *(json.dumps(item) for item in neutral)])
        raise UnsupportedError(name, reprlib.repr(value), f"{expected}: this server does no more", "leave it out")


_ZERO = (0, 0.0)
_SHARED: dict[str, Reader] = {
    "model": _text,
    "max_tokens": _whole(1),
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "seed": _whole(-(2**63), 2**63 - 1),
    "stop": _stop,
    "stream": _flag,
    "stream_options": _stream_options,
    "user": _text,  # names the caller, and asks for nothing
}
_SHARED_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "presence_penalty": _ZERO, "frequency_penalty": _ZERO, "logit_bias": ({},),
}  # fmt: skip
CHAT = Endpoint(
    content="messages",
    readers={
        **_SHARED, "messages": _messages, "max_completion_tokens": _whole(1), "safety_identifier": _text, "prompt_cache_key": _text,
    },
    neutral={
        **_SHARED_NEUTRAL, "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
        "function_call": ("none", "auto"), "logprobs": (False,), "top_logprobs": (0,), "response_format": ({"type": "text"},),
        "modalities": (["text"],), "audio": (), "prediction": (), "web_search_options": (), "reasoning_effort": ("none",),
        "verbosity": ("medium",), "store": (False,), "metadata": ({},), "service_tier": ("auto", "default"), "moderation": (),
        "prompt_cache_retention": (), "prompt_cache_options": (),
    },
)  # fmt: skip
COMPLETIONS = Endpoint(
    content="prompt",
    readers={**_SHARED, "prompt": _prompt},
    neutral={**_SHARED_NEUTRAL, "best_of": (1,), "echo": (False,), "logprobs": (), "suffix": ("",)},
)


def read_body(data: bytes) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
        ConfigError: no UTF-8, no JSON, numbers that JSON does not have, or something else than an object.
    """
    try:
        body = json.loads(data.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise ConfigError("body", "bytes that are no UTF-8", "a JSON object", "encode it as UTF-8") from error
    except RecursionError as error:
        raise ConfigError("body", "JSON nested too deeply", "a JSON object", "correct the request") from error
    except ValueError as error:
        raise ConfigError("body", f"no JSON ({error})", "a JSON object", "correct the request") from error
    if not isinstance(body, dict):
        raise ConfigError("body", f"a JSON {type(body).__name__}", "a JSON object", "correct the request")
    return body


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")
