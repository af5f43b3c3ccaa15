"""Values of a config.json, checked one by one: JSON knows types, but what writes it does not always."""

from __future__ import annotations

import json
import reprlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medusa_export.core.errors import ConfigError
from medusa_export.core.regular_files import found_instead

# What runtimes keep in 32 bits. Layers are fewer by far, and a list of every layer's tensors has to fit into memory.
_LARGEST = {"num_hidden_layers": 1000}
_LARGEST_INT = 2**31 - 1
_LARGEST_FLOAT = sys.float_info.max
HUGGING_FACE = ("a Hugging Face directory with it", "download the file again")  # for :func:`read_json`
_REASONS = ((UnicodeDecodeError, "not UTF-8"), (RecursionError, "nested too deeply"), (MemoryError, "too large"))
_KINDS = (
    (type(None), "null"), (bool, "true or false"), ((int, float), "number"), (str, "text"), (list, "list"), (dict, "object"),
)  # fmt: skip
_LARGEST_EXACT = 2**53  # of integers that stand for a number: what computes with them keeps them in 64 bits


class Fields:
    """The keys of one JSON object; an absent key and null are the same.

    Args:
        raw: the object.
        where: its file, for errors.
        inside: the key under which the object is found in it, if any.
    """

    def __init__(self, raw: Mapping[str, Any], where: str, inside: str = "") -> None:
        self.raw, self.where, self._prefix = raw, where, f"{inside}." if inside else ""

    def positive(self, key: str, default: int | None = None) -> int:
        """A positive integer; without a default it has to be there."""
        value = self._get(key, default)
        largest = _LARGEST.get(key, _LARGEST_INT)
        if type(value) is not int or value <= 0:
            raise self.error(key, value, "a positive integer")
        if value > largest:
            raise self.error(key, value, f"at most {largest}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number, and a finite one: Python's JSON has NaN, Infinity and integers of any length."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _LARGEST_FLOAT:
            raise self.error(key, value, "a positive number")
        if isinstance(value, int) and value > _LARGEST_EXACT:
            raise self.error(key, value, f"at most {_LARGEST_EXACT}")
        return float(value)

    def numbers(self, key: str, length: int) -> list[float]:
        """A list of that many positive numbers."""
        values = self._get(key, None)
        if not isinstance(values, list) or len(values) != length:
            raise self.error(key, values, f"a list of {length} numbers")
        return [Fields({key: value}, self.where, self._prefix.rstrip(".")).number(key) for value in values]

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false; the text "false" is neither."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def error(self, key: str, value: object, expected: str) -> ConfigError:
        """What to raise about one key; a long value is shortened.

        Args:
            key: of the object.
            value: what it has.
            expected: what it should be, in words.
        """
        return ConfigError(self.where, f"{self._prefix}{key} = {reprlib.repr(value)}", expected, "fix config.json")

    def _get(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        return default if value is None else value


def read_json(path: Path, expected: str = "a JSON object", action: str = "make the file again") -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        path: of the file.
        expected: what should be there, for errors; see :data:`HUGGING_FACE`.
        action: what to do where something else is there.

    Raises:
        ConfigError: missing, unreadable, not UTF-8, not JSON or not an object.
    """
    kind = found_instead(path)
    if kind is not None:
        raise ConfigError(str(path), kind, expected, "check the path")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(str(path), unreadable(error), expected, action) from error
    if not isinstance(body, dict):
        raise ConfigError(str(path), f"a JSON {json_kind(body)}", expected, action)
    return body


def unreadable(error: Exception) -> str:
    """Why a JSON file could not be read, in words for an error message."""
    said = next((text for kind, text in _REASONS if isinstance(error, kind)), str(error))
    return f"unreadable JSON ({said})"


def json_kind(value: object) -> str:
    """What JSON calls a value, instead of Python's name of its type."""
    return next((text for kind, text in _KINDS if isinstance(value, kind)), type(value).__name__)


def whole(row: Mapping[str, Any], key: str, *, least: int = 0) -> int:
    """A whole number of an object that its reader takes apart itself; what it raises is for :func:`odd_value`.

    Args:
        row: the object.
        key: of the number.
        least: that it may be.

    Raises:
        KeyError: the key is not there.
        ValueError: something else is there, or too small or large a number.
    """
    value = row[key]
    if type(value) is not int or not least <= value <= _LARGEST_INT:
        raise ValueError(f"{key} {reprlib.repr(value)}")
    return value


def odd_value(error: Exception) -> str:
    """What was found in JSON that should have had another shape, from what Python raised over it."""
    if isinstance(error, KeyError):
        return f"no {error.args[0]}"
    return str(error) if isinstance(error, ValueError) else "a value of another kind"
