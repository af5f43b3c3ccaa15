"""Messages of a conversation, in the roles and texts that a chat template takes; calls of tools are put into words."""

from __future__ import annotations

from typing import Any

from medusa_export.engines.serving.openai.protocol.readers import Reader, joined, text, unsupported, wrong
from medusa_export.engines.serving.openai.protocol.tools import call_text, response_text

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "user"}
# What clients send along of an answer that they got, where it is none of what was said: chat templates leave it out, too.
LEFT_OUT = ("annotations", "reasoning", "reasoning_content", "reasoning_details")
EMPTY = ("audio", "function_call")  # of answers that this server does not give
KNOWN = ("role", "content", "refusal", "tool_calls", "tool_call_id", *LEFT_OUT, *EMPTY)
TEXTS = {"text": "text", "refusal": "refusal"}  # types of parts that are text, and the field that has it


def messages_reader(passed_over: list[str]) -> Reader:
    """A reader of messages.

    Args:
        passed_over: gets the fields of messages that nothing is made of.
    """

    def read(name: str, value: Any) -> list[dict[str, str]]:
        if not isinstance(value, list) or not value:
            raise wrong(name, value, "a list of messages")
        return [_message(f"{name}[{index}]", message, passed_over) for index, message in enumerate(value)]

    return read


def _message(name: str, value: Any, passed_over: list[str]) -> dict[str, str]:
    if not isinstance(value, dict):
        raise wrong(name, value, '{"role": ..., "content": ...}')
    for key, item in value.items():
        if key in EMPTY:
            if item not in (None, [], ""):
                raise unsupported(f"{name}.{key}", item, "nothing")
        elif key not in KNOWN and item is not None:
            passed_over.append(joined("messages", key))
    role = value.get("role")
    if role == "function":
        raise unsupported(f"{name}.role", role, f"one of {', '.join(ROLES)}", 'use "tool"')
    if not isinstance(role, str) or role not in ROLES:
        raise wrong(f"{name}.role", role, f"one of {', '.join(ROLES)}")
    calls = value.get("tool_calls") or []
    if calls and role != "assistant":
        raise wrong(f"{name}.tool_calls", calls, "nothing in messages that are not the assistant's")
    refusal = value.get("refusal") or ""
    if refusal and role != "assistant":
        raise unsupported(f"{name}.refusal", refusal, "nothing in messages that are not the assistant's")
    content = value.get("content")
    may_be_absent = role in ("assistant", "tool")  # an answer that was only calls, and a tool that had nothing to say
    said = "" if content is None and may_be_absent else _content(f"{name}.content", content)
    said += text(f"{name}.refusal", refusal)
    if role == "tool":
        said = response_text(said)
    return {"role": ROLES[role], "content": said + call_text(f"{name}.tool_calls", calls, has_text=bool(said))}


def _content(name: str, value: Any) -> str:
    """Text, or the text of all parts."""
    if not isinstance(value, list):
        return text(name, value)
    return "".join(_part(f"{name}[{index}]", part) for index, part in enumerate(value))


def _part(name: str, value: Any) -> str:
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise wrong(name, value, '{"type": "text", "text": ...}')
    field = TEXTS.get(value["type"])
    if field is None:
        raise unsupported(f"{name}.type", value["type"], "text", "this model reads text alone")
    return text(f"{name}.{field}", value.get(field))
