"""What a tokenizer's files say against themselves, and what is a note."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_export.exporter.verify.parts.tokenizers import BEYOND, tokenizer_notes, tokenizer_problems

TOKENS = 97


@pytest.fixture
def path(tmp_path: Path, tiny_tokenizer: Callable[..., Path]) -> Path:
    return tiny_tokenizer(tmp_path / "tokenizer")


def edited(path: Path, name: str, change: Callable[[Any], object]) -> list[str]:
    body = json.loads((path / name).read_text("utf-8"))
    change(body)
    (path / name).write_text(json.dumps(body), "utf-8")
    return tokenizer_problems(path, TOKENS, None, "")


def test_a_good_one(path: Path) -> None:
    assert tokenizer_problems(path, TOKENS, None, "") == []
    assert tokenizer_problems(path, TOKENS, path, "the source's") == []
    assert tokenizer_notes(path, TOKENS) == []


def test_more_tokens_than_rows(path: Path) -> None:
    """A few are a note; as many as another model's tokenizer has are a problem, unless the source has them too."""
    assert tokenizer_problems(path, TOKENS - 7, None, "") == []
    assert len(tokenizer_notes(path, TOKENS - 7)) == 1
    few = TOKENS - 1 - BEYOND
    assert len(tokenizer_problems(path, few, None, "")) == 1
    assert tokenizer_problems(path, few, path, "the source's") == []


def test_two_tokens_of_one_id(path: Path) -> None:
    problems = edited(
        path, "tokenizer.json", lambda body: body["model"]["vocab"].update({"w48": body["model"]["vocab"]["w49"]})
    )
    assert any("gives the id" in line and "to 2 tokens" in line for line in problems)


def test_a_special_token_that_is_unknown(path: Path) -> None:
    (problem, *_) = edited(path, "tokenizer_config.json", lambda body: body.update(eos_token="<never>"))
    assert problem == "tokenizer: tokenizer_config.json has the eos_token '<never>', which tokenizer.json does not know"


def test_a_template_that_does_not_render(path: Path) -> None:
    template = path / "chat_template.jinja"
    template.write_text(template.read_text()[:40] + "{% for")
    for other in (None, path):
        assert "the chat template does not render a question" in tokenizer_problems(path, TOKENS, other, "")[0]
