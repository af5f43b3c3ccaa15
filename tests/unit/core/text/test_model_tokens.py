"""ModelTokens: what ends an answer, where configuration, tokenizer and template differ, and which ids a model may say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.text.model_tokens import ModelTokens, describe_tokens, end_of_turn
from medusa_export.core.text.tokenizer import read_tokenizer

TURN = "{% for m in messages %}<user> {{ m['content'] }}END{% endfor %}"


@pytest.fixture
def tokenizer(tmp_path: Path, tiny_tokenizer: Callable[..., Path]) -> Any:
    return read_tokenizer(tiny_tokenizer(tmp_path))


@pytest.mark.parametrize(
    ("end", "found"), [("<assistant>", 4), (" </s>\n", 2), ("\n<user>", 3), ("", None), (" w3", None)]
)
def test_the_templates_own_end(tokenizer: Any, end: str, found: int | None) -> None:
    tokenizer.chat_template = TURN.replace("END", end)
    assert end_of_turn(tokenizer) == found


def test_a_template_without_answers_has_none(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages|length > 1 %}{{ raise_exception('one only') }}{% endif %}{{ messages[0]['content'] }}"
    )
    assert end_of_turn(tokenizer) is None
    tokenizer.chat_template = None
    assert end_of_turn(tokenizer) is None


def test_the_union_with_the_templates_end_first(tokenizer: Any) -> None:
    """As in Llama 3: the configuration names one token, and the template ends a turn with another."""
    tokenizer.chat_template = TURN.replace("END", "<assistant>")
    assert ModelTokens.of(tokenizer, (0, 7, 4), vocab_size=97) == ModelTokens((4, 0, 7, 2), 97)


def test_the_tokenizers_own_end_counts_where_config_names_another(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    assert ModelTokens.of(tokenizer, (0,), vocab_size=97).ends == (0, 2)
    tokenizer.eos_token = None
    assert ModelTokens.of(tokenizer, (), vocab_size=97).ends == ()


@pytest.mark.parametrize(("vocab_size", "count"), [(97, 97), (128, 97), (50, 50)])
def test_ids_that_model_and_tokenizer_both_know(tokenizer: Any, vocab_size: int, count: int) -> None:
    assert ModelTokens.of(tokenizer, (96, 110), vocab_size=vocab_size).count == count
    assert 110 not in ModelTokens.of(tokenizer, (96, 110), vocab_size=vocab_size).ends


def test_as_a_person_reads_them(tokenizer: Any) -> None:
    assert describe_tokens(tokenizer, (2, 4)) == "</s> (id 2), <assistant> (id 4)"
