"""Lines of JSONL files, with errors that name the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from medusa_export.core.errors import ConfigError
from medusa_export.core.json_fields import json_kind
from medusa_export.core.regular_files import found_instead


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Line numbers, from 1, and lines of a JSONL file; blank lines are left out.

    Raises:
        ConfigError: the file cannot be read.
    """
    kind = found_instead(path)
    if kind is not None:
        raise ConfigError(str(path), f"no readable file ({kind})", "a JSONL file", "check the path")
    try:
        with path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    except OSError as error:
        raise ConfigError(
            str(path), f"no readable file ({error.strerror})", "a JSONL file", "check the path"
        ) from error


def json_object(line: bytes, where: str) -> dict[str, Any]:
    """The object that a JSONL line holds.

    Raises:
        ConfigError: it holds something else; ``where`` is what the error names.
    """
    try:
        body = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(where, "bytes that are not UTF-8", "one JSON object a line", "correct the line") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(where, f"no JSON ({error})", "one JSON object a line", "correct the line") from error
    if not isinstance(body, dict):
        raise ConfigError(where, f"a JSON {json_kind(body)}", "an object", "correct the line")
    return body


def is_text(value: object) -> TypeGuard[str]:
    """Whether it is text of whole characters: JSON can spell half of a surrogate pair, which no tokenizer takes."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)
