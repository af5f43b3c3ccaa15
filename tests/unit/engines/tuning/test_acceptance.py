"""Ranks along an engine's greedy answers against a scripted model, and against what decoding with the tree then yields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.engines.decoding.generate import generate
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE, TreeDecoder
from medusa_export.engines.decoding.single_slot import OneSequence
from medusa_export.engines.onnxruntime.batch_engine import TreeBatchDecoder
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.engines.tuning.acceptance import measure_acceptance
from medusa_export.heads.trees.acceptance import ABSENT, Acceptance, Ranks
from medusa_export.heads.trees.tree import Tree
from tests.unit.engines.decoding.test_generate import EOS, PROMPT, ScriptedEngine, with_eos


def scripted(ranks: tuple[int, ...], *, eos_at: int | None = None, max_length: int = 1000) -> OneSequence:
    """A stand-in with so many heads."""
    engine = ScriptedEngine(with_eos(eos_at) if eos_at else ScriptedEngine().truth, ranks, max_length)
    engine.info.max_depth, engine.info.eos_token_ids = len(ranks), (EOS,)
    return OneSequence(engine)


def ranks_of(decoder: TreeDecoder, *, max_new_tokens: int) -> Ranks:
    (answer,) = measure_acceptance(decoder, [("a", "b", PROMPT)], max_new_tokens=max_new_tokens)
    return answer.ranks


def test_ranks_of_every_head_at_every_token() -> None:
    ranks = ranks_of(scripted((2, -1, 0)), max_new_tokens=6)
    assert ranks.shape == (6, 3)
    assert ranks[:, 0].tolist() == [2, 2, 2, 2, 2, -1]  # behind the last token nothing is known
    assert ranks[:, 1].tolist() == [ABSENT] * 4 + [-1] * 2
    assert ranks[:, 2].tolist() == [0] * 3 + [-1] * 3


def test_it_ends_with_the_answer_and_with_the_context() -> None:
    assert len(ranks_of(scripted((0,), eos_at=4), max_new_tokens=50)) == 5
    assert len(ranks_of(scripted((0,), max_length=len(PROMPT) + 7), max_new_tokens=50)) == 8


@pytest.mark.parametrize("tree", [[[0]], [[0], [1], [0, 0]], [[0], [0, 0], [0, 0, 0], [1]]], ids=str)
def test_a_real_engine_yields_with_a_tree_what_was_counted(
    tree: list[list[int]], tiny_engine: Callable[..., Any]
) -> None:
    """The ranks predict exactly how many steps and tokens decoding with any tree takes."""
    engine = OnnxRuntimeEngine(tiny_engine(drafts_well=True).path)
    chosen = Tree.from_choices(tree)
    prompts = [(str(n), "c", [5 + n, 9, 11]) for n in range(3)]
    found = Acceptance.from_answers(measure_acceptance(OneSequence(engine), prompts, max_new_tokens=24))
    tokens = steps = 0
    for _, _, ids in prompts:
        result = generate(engine, ids, chosen, max_new_tokens=24, eos_token_ids=engine.info.eos_token_ids)
        plain = generate(engine, ids, AUTOREGRESSIVE, max_new_tokens=24, eos_token_ids=engine.info.eos_token_ids)
        assert result.tokens == plain.tokens
        tokens, steps = tokens + len(result.tokens) - 1, steps + len(result.accepted)
    predicted, (low, high) = found.walk(chosen) or pytest.fail("there are answers")
    assert predicted == pytest.approx(tokens / steps)
    assert predicted > 1.2
    assert low <= predicted <= high


def test_many_at_once_as_one_after_another(tiny_engine: Callable[..., Any]) -> None:
    """More prompts than slots, whose answers end at different steps: their ends free slots, and move others."""
    made = tiny_engine(drafts_well=True)
    engine = OnnxRuntimeEngine(made.path)
    prompts = [(f"{n}", "c", [5 + n, 9, *range(3, 3 + n)]) for n in range(5)]
    plain = [generate(engine, ids, AUTOREGRESSIVE, max_new_tokens=24, eos_token_ids=()) for _, _, ids in prompts]
    ends = tuple({plain[1].tokens[3], plain[3].tokens[11]})  # so that some answers are shorter
    seen: list[int] = []
    found = []
    for decoder in (OneSequence(engine), TreeBatchDecoder(made.path, slots=2), TreeBatchDecoder(made.path, slots=8)):
        decoder.info = replace(decoder.info, eos_token_ids=ends)
        found.append(measure_acceptance(decoder, prompts, max_new_tokens=24, progress=lambda: seen.append(1)))
    lengths = [len(answer.ranks) for answer in found[0]]
    assert len(set(lengths)) > 1
    assert len(seen) == 3 * len(prompts)
    for other in found[1:]:
        for one, many in zip(found[0], other, strict=True):
            assert (one.prompt, one.category) == (many.prompt, many.category)
            assert one.ranks.tolist() == many.ranks.tolist()
            assert np.array_equal(one.lookup, many.lookup)


def test_an_engine_without_heads(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no Medusa heads"):
        measure_acceptance(scripted(()), [("a", "b", PROMPT)], max_new_tokens=4)


def test_answers_of_one_token() -> None:
    """One answer of two tokens is enough to count something."""
    with pytest.raises(ConfigError, match=r"every answer has one token: nothing to count.*answered at more length"):
        measure_acceptance(scripted((0,)), [("a", "b", PROMPT)] * 3, max_new_tokens=1)
    assert len(ranks_of(scripted((0,), eos_at=1), max_new_tokens=4)) == 2


@pytest.mark.parametrize("slots", [1, 4])
def test_a_token_without_embedding(slots: int, tiny_engine: Callable[..., Any]) -> None:
    """It is named before anything is run."""
    made, seen = tiny_engine(), list[int]()
    decoder = TreeBatchDecoder(made.path, slots=slots)
    with pytest.raises(ConfigError, match="got the token 200; expected ids below the model's vocab_size 97"):
        measure_acceptance(
            decoder, [("a", "b", PROMPT), ("c", "d", [5, 200, 3])], max_new_tokens=4, progress=lambda: seen.append(1)
        )
    assert (seen, decoder.active) == ([], 0)


def test_progress() -> None:
    seen = []
    measure_acceptance(scripted((0,)), [("a", "b", PROMPT)] * 3, max_new_tokens=4, progress=lambda: seen.append(1))
    assert np.sum(seen) == 3
