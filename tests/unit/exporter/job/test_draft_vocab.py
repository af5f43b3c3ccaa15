"""Which tokens drafts are drawn from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medusa_export.core.text.prompts import Prompt
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.exporter.job.draft_vocab import most_frequent_tokens

SPECIAL = 5  # ids 0 .. 4 of the tiny tokenizer; word w{i} is id i + 5
EOS = 2


@pytest.fixture
def tokenizer(tmp_path: Path, tiny_tokenizer: Callable[..., Path]) -> Any:
    return read_tokenizer(tiny_tokenizer(tmp_path))


def asked(question: str, answer: str = "") -> Prompt:
    return Prompt("1", "", ({"role": "user", "content": question},), answer)


def test_most_frequent_first_then_the_lowest_ids(tokenizer: Any) -> None:
    prompts = [asked("w9 w9 w9 w9", "w30 w30 w30 w7"), asked("w9", "w30 w7")]
    ids = most_frequent_tokens(tokenizer, prompts, size=6, vocab_size=97, ends=[EOS])
    assert ids.dtype == torch.int64
    assert ids[:1].tolist() == [30 + SPECIAL]
    assert set(ids[1:3].tolist()) == {7 + SPECIAL, EOS}  # twice each: the end of sequence counts once an answer
    assert ids[3:].tolist() == [0, 1, 3]


def test_questions_count_where_there_are_no_answers(tokenizer: Any) -> None:
    ids = most_frequent_tokens(tokenizer, [asked("w50 w50 w50 w60 w60")], size=2, vocab_size=97)
    assert ids.tolist() == [50 + SPECIAL, 60 + SPECIAL]


@pytest.mark.parametrize("size", [1, 40, 97, 500])
def test_every_token_once(size: int, tokenizer: Any) -> None:
    ids = most_frequent_tokens(tokenizer, [asked("w1 w2", "w3 w91 w3")], size=size, vocab_size=97).tolist()
    assert len(ids) == len(set(ids)) == min(size, 97)
    assert set(ids) <= set(range(97))


def test_tokens_beyond_the_models_vocabulary_are_left_out(tokenizer: Any) -> None:
    ids = most_frequent_tokens(tokenizer, [asked("q", "w90 w90 w90 w10")], size=20, vocab_size=50).tolist()
    assert 90 + SPECIAL not in ids
    assert 10 + SPECIAL in ids
    assert max(ids) < 50
