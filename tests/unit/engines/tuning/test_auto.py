"""The tree of an engine that was just written: which prompts it is measured on, what is left, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.core.text.prompts import Prompt
from medusa_export.engines.tuning.auto import choose_tree
from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.trees.acceptance import Acceptance
from medusa_export.heads.trees.tree import load_tree


@pytest.fixture
def engine(tiny_engine: Callable[..., Any]) -> Path:
    path: Path = tiny_engine(drafts_well=True).path
    return path


def prompt(name: str, words: int) -> Prompt:
    return Prompt(name, "c", [{"role": "user", "content": " ".join(f"w{n % 60}" for n in range(words))}])


def test_prompts_that_are_too_long_are_left_out(engine: Path) -> None:
    """Also one that fills the context by itself."""
    why = choose_tree(engine, [prompt("short", 3), prompt("long", 60), prompt("endless", 500), prompt("other", 5)])
    assert [answer.prompt for answer in Acceptance.load(engine / "acceptance.json").answers] == ["short", "other"]
    assert load_tree(str(engine / "tree.json"))
    assert json.loads((engine / "tree.json").read_text())["why"] == why
    assert "batch 1 with 64 tokens in the cache" in why  # half of the context
    assert [curve["past_length"] for curve in json.loads((engine / "cost.json").read_text())["curves"]] == [64]


def test_no_prompt_fits(engine: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--tree auto: got prompts of \d\d tokens and more; expected one of at most 32;"
    ):
        choose_tree(engine, [prompt("long", 60), prompt("endless", 500)])


def test_answers_of_one_token(engine: Path) -> None:
    info = EngineInfo.load(engine)
    replace(info, eos_token_ids=tuple(range(info.vocab_size))).save(engine)
    with pytest.raises(ConfigError, match="every answer has one token: nothing to count"):
        choose_tree(engine, [prompt("a", 3), prompt("b", 5)])
    assert not (engine / "acceptance.json").exists()
