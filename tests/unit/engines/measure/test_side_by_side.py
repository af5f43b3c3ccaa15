"""Trees side by side on a given clock: answers of one token, whose time is no step's, and intervals over few prompts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from medusa_export.engines.decoding.protocols import Generation
from medusa_export.engines.measure import side_by_side
from medusa_export.engines.measure.side_by_side import Measured, compare
from medusa_export.heads.trees.tree import Tree

TREE = Tree.from_choices([[0]])


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``compared(lengths)``: what answers of so many tokens give, where a step takes 2 ms, one with the tree 3 ms for two tokens."""

    def timed(engine: Any, input_ids: list[int], tree: Tree, **_: Any) -> Generation:
        decoded, yields = input_ids[0] - 1, tree.num_nodes
        steps = -(-decoded // yields)
        return Generation([1] * input_ids[0], accepted=[yields] * steps, decode_ms=0.001 + steps * (1 + yields))

    def run(lengths: list[int]) -> Measured[Tree]:
        engine: Any = SimpleNamespace(info=SimpleNamespace(eos_token_ids=()))
        (found,) = compare(engine, [TREE], [[length] for length in lengths], max_new_tokens=99)
        return found

    monkeypatch.setattr(side_by_side, "generate", timed)
    return run


def test_answers_of_one_token_are_not_decoded(compared: Any) -> None:
    found, alone = compared([9, 1, 9, 1, 9]), compared([9, 9, 9])
    assert found == alone
    assert found.speedup == pytest.approx(4 / 3, rel=1e-3)
    assert (
        found.interval == (pytest.approx(4 / 3, rel=1e-3),) * 2
    )  # every draw is of the same answers: none is of no answer
    assert found.tokens_per_step == 2


def test_two_prompts_have_no_interval(compared: Any) -> None:
    for lengths in ([9], [9, 5], [9, 1, 5, 1, 1]):
        found = compared(lengths)
        assert found.interval is None
        assert found.speedup == pytest.approx(4 / 3, rel=1e-2)


def test_nothing_decoded_is_nothing_measured(compared: Any) -> None:
    assert compared([1, 1, 1, 1]) == Measured(TREE, None, None, None)
