"""load_prompts, read_tokenizer, encode_chat."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.core.text.encoding import encode_chat
from medusa_export.core.text.prompts import Prompt, load_prompts
from medusa_export.core.text.tokenizer import read_tokenizer

ASK, ANSWER = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}
SYSTEM = {"role": "system", "content": "Be brief."}


def _write(path: Path, *lines: object) -> Path:
    path.write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    return path


def test_the_three_shapes(tmp_path: Path) -> None:
    file = _write(
        tmp_path / "p.jsonl",
        {"question_id": 81, "category": "writing", "turns": ["First\u2028turn", "Second turn"]},
        "\n",
        {"id": "x1", "source": "gsm8k", "messages": [{**ASK, "extra": 1}]},
        {"messages": [SYSTEM, ASK, ANSWER, ASK, ANSWER, ANSWER]},
        {"prompt": "Grüße"},
    )
    prompts = load_prompts(file)
    assert prompts == [
        Prompt("81", "writing", ({"role": "user", "content": "First\u2028turn"},)),
        Prompt("x1", "gsm8k", (ASK,)),
        Prompt("4", "", (SYSTEM, ASK, ANSWER, ASK), "Yes.\nYes."),
        Prompt("5", "", ({"role": "user", "content": "Grüße"},)),
    ]
    assert load_prompts(file, limit=2) == prompts[:2]
    assert load_prompts(file, limit=9) == prompts


def test_every_prompt_has_an_id_of_its_own(tmp_path: Path) -> None:
    """Also in two files of one numbering behind each other, and beside lines without ids; null is no id, and no category."""
    lines = [
        {"id": 1},
        {"id": "4"},
        {"id": 1, "category": None},
        {},
        {"question_id": None, "id": 1},
        {"id": None, "source": "x"},
    ]
    prompts = load_prompts(_write(tmp_path / "p.jsonl", *({"prompt": "a", **line} for line in lines)))
    assert [prompt.id for prompt in prompts] == ["1", "4", "1 (line 3)", "4 (line 4)", "1 (line 5)", "6"]
    assert [prompt.category for prompt in prompts] == ["", "", "", "", "", "x"]


def test_lines_after_the_limit_are_not_read(tmp_path: Path) -> None:
    assert len(load_prompts(_write(tmp_path / "p.jsonl", {"prompt": "a"}, "{broken"), limit=1)) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken\n", "no JSON"),
        ("[1]\n", "a JSON list"),
        ({"text": "a", "more": 1}, "the keys more, text; expected messages, turns or prompt"),
        ({}, "the keys nothing"),
        ({"prompt": 3}, "the message"),
        ({"prompt": "  "}, "nothing that a user asks"),
        ({"turns": []}, "null for a list"),
        ({"turns": "Hi"}, "null for a list"),
        ({"messages": "Hi"}, "text for a list"),
        ({"messages": []}, "nothing that a user asks"),
        ({"messages": [ANSWER]}, "nothing that a user asks"),
        ({"messages": [ASK, SYSTEM]}, "nothing that a user asks"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "expected a role of system, user, assistant"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "expected a role of"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "text as content"),
        ({"messages": ["Hi"]}, "the message 'Hi'"),
        ('{"prompt": "half of a pair \\ud83d"}\n', "text as content"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    file = _write(tmp_path / "p.jsonl", {"prompt": "fine"}, "\n", line)
    with pytest.raises(ConfigError, match=message) as caught:
        load_prompts(file)
    assert caught.value.where == f"{file}:3"


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no readable file"):
        load_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(ConfigError, match="no readable file"):
        load_prompts(tmp_path)
    with pytest.raises(ConfigError, match="no prompts"):
        load_prompts(_write(tmp_path / "empty.jsonl", "\n\n"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "Gr\xfc\xdfe"}\n')
    with pytest.raises(ConfigError, match=r"latin\.jsonl:1: got bytes that are not UTF-8"):
        load_prompts(tmp_path / "latin.jsonl")
    with pytest.raises(ConfigError, match="limit: got 0"):
        load_prompts(_write(tmp_path / "p.jsonl", {"prompt": "a"}), limit=0)


def test_encode_chat(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tokenizer = read_tokenizer(tiny_tokenizer(tmp_path))
    messages = ({"role": "user", "content": "w0 w3"}, {"role": "assistant", "content": "w1"})
    ids = encode_chat(tokenizer, messages)
    assert ids == [1, 3, 5, 8, 2, 4, 6, 2, 4]  # <s> <user> w0 w3 </s> <assistant> w1 </s> <assistant>
    assert type(ids) is list
    assert all(type(token) is int for token in ids)


def test_no_special_tokens_besides_the_templates(tmp_path: Path, tiny_tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer: Any = read_tokenizer(tiny_tokenizer(tmp_path))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer("w0")["input_ids"] == [1, 5]
    assert encode_chat(tokenizer, [{"role": "user", "content": "w0"}])[:3] == [1, 3, 5]


def test_chat_templates_that_refuse(tmp_path: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        encode_chat(read_tokenizer(tiny_tokenizer(tmp_path / "plain", chat_template=False)), [ASK])
    tokenizer = read_tokenizer(tiny_tokenizer(tmp_path / "chat"))
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ConfigError, match=r"a refusal \(System role not supported\)"):
        encode_chat(tokenizer, [SYSTEM, ASK])
    for template in ("{% if %}", "{{ 1 / 0 }}", "{{ messages + 1 }}", "{% for i in range(10 ** 9) %}{% endfor %}"):
        tokenizer.chat_template = template
        with pytest.raises(ConfigError, match="a refusal"):
            encode_chat(tokenizer, [ASK])


@pytest.mark.timeout(60, method="thread")  # an opened FIFO waits, out of the reach of signals
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_a_fifo_is_not_opened(tmp_path: Path, name: str, tiny_tokenizer: Any) -> None:
    directory = tiny_tokenizer(tmp_path)
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    with pytest.raises(ConfigError, match=f"{name}: got a FIFO"):
        read_tokenizer(directory)
    with pytest.raises(ConfigError, match=f"{name}: got no readable file"):
        load_prompts(directory / name)


def test_code_of_a_tokenizers_own_is_not_run(tmp_path: Path, tiny_tokenizer: Any) -> None:
    directory = tiny_tokenizer(tmp_path)
    (directory / "own.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Own: pass\n")
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="an unreadable tokenizer") as caught:
        read_tokenizer(directory)
    assert "trust_remote_code" not in str(caught.value)
    assert not (tmp_path / "mark").exists()


def test_tokenizers_that_are_not_there(tmp_path: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="no tokenizer"):
        read_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="no tokenizer"):
        read_tokenizer(Path("gpt2"))  # a name on the hub is not a directory
    directory = tiny_tokenizer(tmp_path / "damaged")
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="an unreadable tokenizer") as caught:
        read_tokenizer(directory)
    assert "\n" not in str(caught.value)
