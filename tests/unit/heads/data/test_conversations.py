"""read_conversations: every shape down to the same turns, and every bad line by its number."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.heads.data.conversations import Conversation, read_conversations


def _write(path: Path, *lines: object) -> Path:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def _read_one(tmp_path: Path, line: dict[str, Any]) -> Conversation:
    (conversation,), problems = read_conversations([_write(tmp_path / "chats.jsonl", line)])
    assert problems == []
    return conversation


def _said(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


SHAREGPT = {
    "id": "QWJhYvA_0",
    "conversations": [
        _said("system", "Be brief."),
        _said("human", "Hi?"),
        _said("gpt", "Yes."),
        _said("human", "Why?"),
    ],
}
DARING_ANTEATER = {
    "system": "Be brief.",
    "mask": "User",
    "dataset": "open_platypus",
    "conversations": [
        {"from": "User", "value": "Hi?", "label": None},
        {"from": "Assistant", "value": "Yes.", "label": None},
        {"from": "User", "value": "Why?", "label": None},
    ],
}
OPENAI = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi?", "name": "x"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "half \ud83d"},
    ]
}


@pytest.mark.parametrize(
    ("line", "name", "source"),
    [(SHAREGPT, "QWJhYvA_0", "chats"), (DARING_ANTEATER, "1", "open_platypus"), (OPENAI, "1", "chats")],
)
def test_a_conversation_in_three_shapes(tmp_path: Path, line: dict[str, Any], name: str, source: str) -> None:
    conversation = _read_one(tmp_path, line)
    assert conversation == Conversation(name, source, "Be brief.", ("Hi?", "Why?"))
    content = '{"system": "Be brief.", "turns": ["Hi?", "Why?"]}'  # or rows that are on people's disks are made again
    assert conversation.key == hashlib.sha256(content.encode()).hexdigest()[:32]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"prompt": "Grüße\u2028!", "id": 7}, Conversation("7", "chats", "", ("Grüße\u2028!",))),
        (
            {"question_id": 81, "category": "writing", "turns": ["One", "Two"]},
            Conversation("81", "writing", "", ("One", "Two")),
        ),
        ({"prompt": "a", "system": None, "source": "s"}, Conversation("1", "s", "", ("a",))),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, Conversation("1", "chats", "", ("a", "a"))),
        ({"conversations": [_said("gpt", "Hello!"), _said("USER", "a")]}, Conversation("1", "chats", "", ("a",))),
        (
            {"mask": "Ann", "conversations": [_said("Ann", "a"), _said("assistant", "b")]},
            Conversation("1", "chats", "", ("a",)),
        ),
        (
            {"mask": "Assistant", "conversations": [_said("User", "a"), _said("Assistant", "b")]},
            Conversation("1", "chats", "", ("a",)),
        ),
        (
            {"system": "S", "conversations": [_said("system", "S"), _said("system", "T"), _said("human", "a")]},
            Conversation("1", "chats", "S\n\nT", ("a",)),
        ),
        ({"messages": None, "prompt": "a"}, Conversation("1", "chats", "", ("a",))),
    ],
)
def test_other_shapes(tmp_path: Path, line: dict[str, Any], expected: Conversation) -> None:
    assert _read_one(tmp_path, line) == expected


def test_the_same_content_counts_once(tmp_path: Path) -> None:
    first = _write(tmp_path / "a.jsonl", {"id": 1, "prompt": "x"}, {"id": 2, "prompt": "y"}, {"id": 3, "turns": ["x"]})
    second = _write(tmp_path / "b.jsonl", {"prompt": "y"}, {"prompt": "z"}, {"prompt": "y", "system": "s"}, "{bad")
    found, _ = read_conversations([first, second], limit=4)  # what lies behind the limit is not read
    assert [(item.id, item.turns[0], item.system) for item in found] == [
        ("1", "x", ""),
        ("2", "y", ""),
        ("2", "z", ""),
        ("3", "y", "s"),
    ]


BAD: list[tuple[object, str]] = [
    ("{broken", "no JSON"),
    ("[" * 100_000, "no JSON"),
    ('"text"', "a JSON text"),
    ({"text": "a"}, "the keys text; expected one of messages, conversations, turns, prompt"),
    ({"messages": []}, "the user says nothing"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "the user says nothing"),
    ({"turns": ["a", " "]}, "the user says nothing"),
    ({"turns": "a"}, "got a JSON text; expected a list"),
    ({"turns": ["a", 3]}, "got 3; expected text"),
    ({"prompt": ["a"]}, "expected text"),
    ({"prompt": "half of a pair \ud83d"}, "expected text of whole characters"),
    ({"prompt": "a", "id": "\ud83d"}, "expected text of whole characters"),
    ({"prompt": "a", "system": 3}, "expected text"),
    ({"conversations": ["a"]}, "the message 'a'"),
    ({"conversations": [_said("tool", "a")]}, "expected one from system, developer, user, human"),
    ({"conversations": [{"from": ["human"], "value": "a"}]}, "expected one from"),
    ({"conversations": [{"from": "human"}]}, "got None; expected text"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "expected text"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, "after the user's"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_a_bad_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    file = _write(tmp_path / "p.jsonl", {"prompt": "fine"}, "", line, {"prompt": "more"})
    with pytest.raises(ConfigError, match=message) as caught:
        read_conversations([file])
    assert caught.value.where == f"{file}:3"
    found, problems = read_conversations([file], skip_bad=True)
    assert [conversation.turns for conversation in found] == [("fine",), ("more",)]
    assert [problem.split(": ")[0] for problem in problems] == [f"{file}:3"]
    assert "\n" not in problems[0]


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_conversations([tmp_path / "absent.jsonl"], skip_bad=True)
    with pytest.raises(ConfigError, match="no conversations, 1 bad lines"):
        read_conversations([_write(tmp_path / "bad.jsonl", "{bad")], skip_bad=True)
    with pytest.raises(ConfigError, match="no conversations, 0 bad lines"):
        read_conversations([_write(tmp_path / "empty.jsonl", "", "")])
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "Gr\xfc\xdfe"}\n')
    with pytest.raises(ConfigError, match=r"latin\.jsonl:1: got bytes that are not UTF-8"):
        read_conversations([tmp_path / "latin.jsonl"])
    with pytest.raises(ConfigError, match="limit: got 0"):
        read_conversations([_write(tmp_path / "p.jsonl", {"prompt": "a"})], limit=0)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="a FIFO"):
        read_conversations([tmp_path / "fifo"])
