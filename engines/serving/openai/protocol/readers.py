"""Readers of single JSON values: each gives a value of one type, or says what it got and expected."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable
from typing import Any, NoReturn

from medusa_export.core.errors import ConfigError
from medusa_export.engines.serving.openai.protocol.errors import UnknownFieldError, UnsupportedError

Reader = Callable[[str, Any], Any]  # name and JSON value -> value; raises ConfigError
NAME_LENGTH = 64  # of names that a client made up, in what it is told


def wrong(name: str, value: object, expected: str) -> ConfigError:
    """The error for a value of another type or out of range.

    Args:
        name: of the field.
        value: what it holds.
        expected: what it should hold.
    """
    return ConfigError(name, reprlib.repr(value), expected, "correct the request")


def unsupported(name: str, value: object, expected: str, action: str = "leave it out") -> UnsupportedError:
    """The error for what is in the protocol, but not here.

    Args:
        name: of the field.
        value: what it holds.
        expected: what this server takes.
        action: what to do.
    """
    return UnsupportedError(name, reprlib.repr(value), expected, action)


def unknown(name: str, key: str, expected: str) -> UnknownFieldError:
    """The error for a field that the protocol does not have.

    Args:
        name: of the object that holds the field; empty for the body.
        key: of the field.
        expected: fields that there are.
    """
    return UnknownFieldError(joined(name, key), "a field of that name", expected, "leave it out")


def joined(name: str, key: str) -> str:
    """How a field of a field is called; what is made up is cut, and spelled so that every line and every label can hold it."""
    shown = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in key[:NAME_LENGTH])[:NAME_LENGTH]
    return f"{name}.{shown}" if name else shown


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(name, value, "text")
    return value


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(name, value, "an object")
    return value


def whole(least: int, most: float = math.inf) -> Reader:
    """A reader of whole numbers."""
    expected = f"a whole number, {least} or more" if most == math.inf else f"a whole number, {least} .. {most}"

    def read(name: str, value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise wrong(name, value, expected)
        return value

    return read


def number(least: float, most: float) -> Reader:
    """A reader of numbers."""

    def read(name: str, value: Any) -> float:
        if type(value) not in (int, float) or not least <= value <= most:
            raise wrong(name, value, f"a number, {least:g} .. {most:g}")
        return float(value)

    return read


def stop_words(name: str, value: Any) -> tuple[str, ...]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise wrong(name, value, "text, or a list of texts, none of them empty")
    return tuple(words)


def logit_bias(name: str, value: Any) -> dict[int, float]:
    """What is added to the logits of tokens, whose ids JSON has as text."""
    if not isinstance(value, dict) or not all(key.isascii() and key.isdecimal() and len(key) < 10 for key in value):
        raise wrong(name, value, 'token ids and numbers: {"50256": -100}')
    return {int(key): number(-100, 100)(joined(name, key), item) for key, item in value.items()}


def prompts(name: str, value: Any) -> list[str | tuple[int, ...]]:
    """One or several texts or lists of token ids."""
    listed = value if isinstance(value, list) and value and isinstance(value[0], (str, list)) else [value]
    return [_prompt(name if len(listed) == 1 else f"{name}[{at}]", item) for at, item in enumerate(listed)]


def _prompt(name: str, value: Any) -> str | tuple[int, ...]:
    if isinstance(value, list):
        if not value or not all(type(item) is int for item in value):
            raise wrong(name, value, "text or token ids")
        return tuple(value)
    return text(name, value)


def require_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    """Raise UnsupportedError for a value that would have to be passed over.

    Args:
        name: of the field.
        value: what it holds.
        neutral: values that ask for nothing.
    """
    if not any(type(value) is type(item) and value == item for item in neutral):
        expected = " or ".join(["nothing", *(json.dumps(item) for item in neutral)])
        raise unsupported(name, value, f"{expected}: this server does no more")


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


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
