"""Conversations in the shapes that people have them in, down to what the user says: the model answers anew."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from medusa_export.core.errors import ConfigError
from medusa_export.core.json_fields import json_kind
from medusa_export.core.json_lines import is_text, json_object, numbered_lines

Message = tuple[str, str]  # role, content

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "model"), "assistant"),
}
_ID_KEYS = ("id", "question_id", "conversation_id")
_SOURCE_KEYS = ("source", "category", "dataset")


@dataclass(frozen=True)
class Conversation:
    """What a user says in a conversation, turn by turn.

    Attributes:
        id: the file's own id, or the line number.
        source: the file's own ``source``, ``category`` or ``dataset``, or the file's name without its suffix.
        system: the system message, or "".
        turns: the user's messages, at least one, none of them blank.
    """

    id: str
    source: str
    system: str
    turns: tuple[str, ...]

    @cached_property
    def key(self) -> str:
        """32 hexadecimal digits of the SHA-256 of what is said: the same for the same content, whatever its id."""
        content = json.dumps({"system": self.system, "turns": self.turns}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]


def read_conversations(
    paths: Sequence[Path], *, skip_bad: bool = False, limit: int | None = None
) -> tuple[list[Conversation], list[str]]:
    """Conversations of JSONL files, in their order; the same content again is left out.

    A line has one of ``messages`` (OpenAI), ``conversations`` (ShareGPT, Daring-Anteater), ``turns`` (Spec-Bench) or
    ``prompt``. Answers in it are dropped; every message of the user's becomes a turn.

    Args:
        skip_bad: leave out lines in no such shape.
        limit: read only the first N conversations.

    Returns:
        the conversations, and what is wrong with the lines that were left out, each with its file and line number.

    Raises:
        ConfigError: an unreadable file, no conversations at all, or the first bad line unless ``skip_bad``.
    """
    if limit is not None and limit < 1:
        raise ConfigError("limit", f"{limit}", "at least one conversation", "leave it out to read all")
    found: dict[str, Conversation] = {}
    problems: list[str] = []
    for path, number, line in _lines(paths):
        if len(found) == limit:
            break
        try:
            conversation = _conversation(line, path, number)
        except ConfigError as error:
            if not skip_bad:
                raise
            problems.append(str(error))
        else:
            found.setdefault(conversation.key, conversation)
    if not found:
        got = f"no conversations, {len(problems)} bad lines"
        raise ConfigError(", ".join(map(str, paths)), got, "one JSON object a line", "check the files")
    return list(found.values()), problems


def _lines(paths: Sequence[Path]) -> Iterator[tuple[Path, int, bytes]]:
    return ((path, number, line) for path in paths for number, line in numbered_lines(path))


def _conversation(line: bytes, path: Path, number: int) -> Conversation:
    where = f"{path}:{number}"
    body = json_object(line, where)
    shape = next((key for key in _SHAPES if body.get(key) is not None), None)
    if shape is None:
        seen = ", ".join(sorted(map(str, body))[:6]) or "nothing"
        raise ConfigError(where, f"the keys {seen}", f"one of {', '.join(_SHAPES)}", "correct the line")
    messages = [("system", _text(body.get("system") or "", where)), *_SHAPES[shape](body, where)]
    turns = tuple(content for role, content in messages if role == "user")
    if not turns or not all(turn.strip() for turn in turns):
        raise ConfigError(where, "a turn in which the user says nothing", "text in every turn", "correct the line")
    roles = [role for role, _ in messages]
    if "system" in roles[roles.index("user") :]:
        raise ConfigError(where, "a system message after the user's", "one before them", "correct the line")
    system = dict.fromkeys(content for role, content in messages if role == "system" and content.strip())
    return Conversation(
        _text(_label(body, _ID_KEYS, number), where),
        _text(_label(body, _SOURCE_KEYS, path.stem), where),
        "\n\n".join(system),  # a set: some files repeat the system message in the list
        turns,
    )


def _listed(key: str) -> Callable[[Mapping[str, Any], str], list[Message]]:
    """Messages with ``role`` and ``content``, or ``from`` and ``value``, as a line's ``key`` lists them."""

    def messages(body: Mapping[str, Any], where: str) -> list[Message]:
        # Daring-Anteater's ``mask`` names who is not learnt from: the user, whatever it calls him.
        roles = {str(body.get("mask", "user")).lower(): "user", **_ROLES}
        return [_message(item, roles, where) for item in _list(body[key], where)]

    return messages


def _turns(body: Mapping[str, Any], where: str) -> list[Message]:
    return [("user", _text(turn, where)) for turn in _list(body["turns"], where)]


def _prompt(body: Mapping[str, Any], where: str) -> list[Message]:
    return [("user", _text(body["prompt"], where))]


_SHAPES: dict[str, Callable[[Mapping[str, Any], str], list[Message]]] = {
    "messages": _listed("messages"),
    "conversations": _listed("conversations"),
    "turns": _turns,
    "prompt": _prompt,
}


def _message(item: object, roles: Mapping[str, str], where: str) -> Message:
    body = item if isinstance(item, dict) else {}
    role = roles.get(str(body.get("from", body.get("role"))).lower())
    if role is None:
        known = ", ".join(_ROLES)
        raise ConfigError(where, f"the message {str(item)[:80]!r}", f"one from {known}", "correct the line")
    if role == "assistant":
        return role, ""  # dropped, so it may be anything
    return role, _text(body.get("value", body.get("content")), where)


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(where, f"a JSON {json_kind(value)}", "a list of messages", "correct the line")
    return value


def _text(value: Any, where: str) -> str:
    if is_text(value):
        return value
    raise ConfigError(where, f"{ascii(value)[:80]}", "text of whole characters", "correct the line")


def _label(body: Mapping[str, Any], keys: Sequence[str], otherwise: object) -> str:
    return str(next((body[key] for key in keys if body.get(key) is not None), otherwise))
