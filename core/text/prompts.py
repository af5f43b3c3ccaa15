"""Prompts from JSONL files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medusa_export.core.errors import ConfigError
from medusa_export.core.json_fields import json_kind
from medusa_export.core.json_lines import is_text, json_object, numbered_lines

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Prompt:
    """What a model is asked, up to where it answers.

    Attributes:
        id: the file's own id, or the line number; of a second one with the same id, both, so that each is found by its own.
        category: the file's ``category`` or ``source``, or "".
        messages: ``{"role", "content"}`` dictionaries, the last of them the user's.
        answer: what the assistant said to it, where the file has that; "" otherwise.
        reference: what a person would answer, Spec-Bench's ``reference`` to the first turn; "" otherwise.
    """

    id: str
    category: str
    messages: tuple[dict[str, str], ...]
    answer: str = ""
    reference: str = ""


def load_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """Prompts of a JSONL file, one object a line, in any of three shapes.

    Spec-Bench: ``question_id``, ``category`` and ``turns``, of which the first one is asked. OpenAI: ``messages``,
    with the answers at their end kept apart. Plain: ``prompt``.

    Args:
        path: the file.
        limit: read only the first N prompts.

    Raises:
        ConfigError: an unreadable file or one without prompts, or a line in no such shape, by file and line number.
    """
    if limit is not None and limit < 1:
        raise ConfigError("limit", f"{limit}", "at least one prompt", "leave it out to read all")
    prompts: dict[str, Prompt] = {}
    for number, line in numbered_lines(path):
        if len(prompts) == limit:
            break
        prompt = _prompt(line, f"{path}:{number}", number)
        while prompt.id in prompts:  # files of several sources, one behind the other
            prompt = replace(prompt, id=f"{prompt.id} (line {number})")
        prompts[prompt.id] = prompt
    if not prompts:
        raise ConfigError(str(path), "no prompts", "one JSON object a line", "check the file")
    return list(prompts.values())


def _prompt(line: bytes, where: str, number: int) -> Prompt:
    body = json_object(line, where)
    messages = _messages(body, where)
    answers: list[str] = []
    while messages and messages[-1]["role"] == "assistant":
        answers.insert(0, messages.pop()["content"])
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise ConfigError(where, "nothing that a user asks", "a last message of the user's", "correct the line")
    prompt_id = _first(body, ("question_id", "id"), number)
    category = _first(body, ("category", "source"), "")
    reference = body.get("reference")
    first = reference[0] if isinstance(reference, list) and reference else reference
    known = first if is_text(first) else ""
    return Prompt(str(prompt_id), str(category), tuple(messages), "\n".join(answers), known)


def _first(body: Mapping[str, Any], keys: Sequence[str], otherwise: object) -> object:
    """The value of the first key that has one; null is none."""
    return next((body[key] for key in keys if body.get(key) is not None), otherwise)


def _messages(body: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    """The conversation of one line, whichever shape it has."""
    if "messages" in body:
        messages = body["messages"]
    elif "turns" in body:
        turns = body["turns"]
        messages = [{"role": "user", "content": turns[0]}] if isinstance(turns, list) and turns else None
    elif "prompt" in body:
        messages = [{"role": "user", "content": body["prompt"]}]
    else:
        seen = ", ".join(sorted(map(str, body))[:6]) or "nothing"
        raise ConfigError(where, f"the keys {seen}", "messages, turns or prompt", "correct the line")
    if not isinstance(messages, list):
        raise ConfigError(where, f"{json_kind(messages)} for a list", "messages or turns", "correct the line")
    return [_message(message, where) for message in messages]


def _message(message: object, where: str) -> dict[str, str]:
    """Role and content alone; other keys would reach the chat template."""
    if not isinstance(message, dict) or message.get("role") not in _ROLES or not is_text(message.get("content")):
        expected = f"a role of {', '.join(_ROLES)} and text as content"
        raise ConfigError(where, f"the message {str(message)[:80]!r}", expected, "correct the line")
    return {"role": message["role"], "content": message["content"]}
