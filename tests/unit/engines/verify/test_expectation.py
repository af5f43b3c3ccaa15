"""Tokens per step against what was counted."""

from __future__ import annotations

import numpy as np
import pytest

from medusa_export.engines.verify.expectation import expectation_findings, foretell
from medusa_export.heads.trees.acceptance import Acceptance, Answer
from medusa_export.heads.trees.tree import Tree

CHAIN = Tree.from_choices([[0], [0, 0]])


def answers(category: str, chance: float, count: int, seed: int = 0) -> list[Answer]:
    """40 tokens each; a head is right with that chance."""
    drawn = np.random.default_rng(seed)
    return [
        Answer(f"{category}{number}", category, (drawn.random((40, 2)) > chance).astype(np.int64) * 10)
        for number in range(count)
    ]


def test_the_interval_holds_what_was_counted() -> None:
    counted = Acceptance.from_answers(answers("code", 0.8, 30))
    found = foretell(counted, CHAIN, ["code"] * 30)
    walked = counted.walk(CHAIN)
    assert found is not None
    assert walked is not None
    assert found.tokens_per_step == pytest.approx(walked[0])
    assert found.low < walked[1][0] < walked[1][1] < found.high
    assert foretell(counted, CHAIN, ["code"] * 3).low < found.low, "few prompts say less"  # type: ignore[union-attr]


def test_each_category_is_foretold_from_its_own() -> None:
    counted = Acceptance.from_answers([*answers("code", 0.95, 20), *answers("chat", 0.2, 20, seed=1)])
    code, chat = (foretell(counted, CHAIN, [name] * 20) for name in ("code", "chat"))
    assert code is not None
    assert chat is not None
    assert code.low > chat.high
    unknown = foretell(counted, CHAIN, ["poems"] * 20)
    assert unknown is not None
    assert chat.tokens_per_step < unknown.tokens_per_step < code.tokens_per_step


def test_findings() -> None:
    expected = foretell(Acceptance.from_answers(answers("", 0.9, 30)), CHAIN, [""] * 10)
    assert expected is not None
    assert expectation_findings(expected, [3, 3, 2] * 7, ignore=False) == []
    (line,) = expectation_findings(expected, [1] * 18 + [2] * 2, ignore=False)
    assert line.startswith(f"1.10 tokens per step; acceptance.json predicts {expected.tokens_per_step:.2f} (")
    assert expectation_findings(expected, [1] * 18 + [2] * 2, ignore=True) == []
    (never,) = expectation_findings(None, [1] * 20, ignore=True)
    assert never.startswith("no draft was accepted in 20 steps")
    assert expectation_findings(None, [1] * 19, ignore=False) == [], "too few to say"
    assert expectation_findings(expected, [1, 2] * 9, ignore=False) == [], "too few to say"
