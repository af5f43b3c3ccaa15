"""Conversations to ids and masks: what is learnt is what the model said, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.core.text.encoding import encode_chat
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.heads.training.dataset import (
    Example,
    data_hash,
    encode,
    load_examples,
    read_rows,
    split,
    usable,
    with_prompts,
)

EOS = (2,)


def row(*contents: str, **extra: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(contents)]
    return {"messages": messages, **extra}


@pytest.fixture
def tokenizer(tiny_tokenizer: Callable[..., Path], tmp_path: Path) -> Any:
    return read_tokenizer(tiny_tokenizer(tmp_path / "tokenizer"))


def test_only_answers_are_marked(tokenizer: Any) -> None:
    example = encode(tokenizer, row("w1 w2", "w3 w4", "w5", "w6"), EOS)
    marked = [token for token, is_answer in zip(example.input_ids, example.answer_mask, strict=True) if is_answer]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("w3 w4", "w6")]
    assert marked == [*expected[0], *EOS, *expected[1], *EOS] or marked == [*expected[0], *expected[1], *EOS]
    prompt = encode_chat(tokenizer, [{"role": "user", "content": "w1 w2"}])
    assert example.input_ids[: len(prompt)] == prompt  # what the engine sees


def test_prompts_are_learnt_on_request(tokenizer: Any) -> None:
    example = encode(tokenizer, row("w1 w2", "w3 w4"), EOS)
    (learnt,) = with_prompts([example])
    assert learnt.input_ids == example.input_ids
    assert learnt.answer_mask == [False] + [True] * (len(example.input_ids) - 1)  # nothing is before the first token


def test_a_cut_answer_does_not_end(tokenizer: Any) -> None:
    whole, cut = (encode(tokenizer, row("w1", "w2 w3", finish_reason=reason), EOS) for reason in ("stop", "length"))
    assert whole.input_ids == [*cut.input_ids, *EOS]


@pytest.mark.parametrize(
    ("extra", "answer", "expected"),
    [({}, "w1", True), ({"finish_reason": "length"}, "w1", False), ({}, "  ", False), ({"usable": False}, "w1", False)],
)
def test_usable(extra: dict[str, Any], answer: str, expected: bool) -> None:
    assert usable(row("w0", answer, **extra)) is expected


def test_truncated_rows_are_left_out_unless_asked_for(tokenizer: Any) -> None:
    rows = [row("w0", "w1 w2 w3"), row("w0", "w1 w2 w3", finish_reason="length")]
    options: dict[str, Any] = {"eos": EOS, "max_length": 64, "vocab_size": 97}
    assert len(load_examples(rows, tokenizer, **options)) == 1
    assert len(load_examples(rows, tokenizer, keep_truncated=True, **options)) == 2
    with pytest.raises(ConfigError, match="1 truncated or empty"):
        load_examples(rows[1:], tokenizer, **options)
    with pytest.raises(ConfigError, match="vocabulary"):
        load_examples([row("w0", "w80 w81")], tokenizer, **options | {"vocab_size": 50})


def test_examples_are_cut_to_the_models_length(tokenizer: Any) -> None:
    found = load_examples([row("w0", "w1 " * 50)], tokenizer, eos=EOS, max_length=16, vocab_size=97)
    assert len(found[0].input_ids) == len(found[0].answer_mask) == 16


def test_a_conversation_stays_on_its_side() -> None:
    examples = [Example([number, 1, 2, 3], [False, False, True, True]) for number in range(400)]
    kept, held = split(examples, 0.1)
    assert 15 < len(held) < 70
    assert len(kept) + len(held) == 400
    more_kept, more_held = split([*examples, Example([9, 9, 9, 9], [False, True, True, True])], 0.1)
    assert {tuple(each.input_ids) for each in held} <= {tuple(each.input_ids) for each in more_held}
    assert data_hash(kept) != data_hash(more_kept)


@pytest.mark.parametrize(
    ("line", "word"),
    [("{", "no JSON"), ("[]", "no conversation"), ('{"messages": []}', "no conversation"),
     (json.dumps({"messages": [{"role": "user", "content": "a"}]}), "no conversation")],
)  # fmt: skip
def test_bad_lines_by_number(line: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row("w0", "w1")) + "\n" + line + "\n")
    with pytest.raises(ConfigError, match=rf"data\.jsonl:2: .*{word}"):
        read_rows([path])
