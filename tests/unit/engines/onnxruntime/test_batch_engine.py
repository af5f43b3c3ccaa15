"""Trees of several sequences at once against one sequence at a time: tokens, accepted counts, slots that are taken over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.engines.decoding.drafters import draft_heads
from medusa_export.engines.decoding.generate import generate
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE, Generation
from medusa_export.engines.decoding.step import decode_step
from medusa_export.engines.onnxruntime import batch_engine as tree_batch
from medusa_export.engines.onnxruntime import lane_plan
from medusa_export.engines.onnxruntime.batch_engine import TreeBatchDecoder
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.engines.onnxruntime.lane_plan import Traffic
from medusa_export.engines.onnxruntime.slots import BatchDecoder
from medusa_export.heads.decoding.accept import Typical
from medusa_export.heads.decoding.sampling import Sampler
from medusa_export.heads.trees.tree import Tree

PROMPTS = [[3, 4, 5], [9, 8, 7, 6, 5, 4, 3], [11], [5, 5, 12, 13], [20, 21]]
LIMITS = [14, 5, 20, 9, 17]  # so that sequences end at different times
APART = Traffic(weights=0, row=1)  # sequences of different lengths never share a run
TREE = Tree.from_choices([[0], [1], [0, 0], [2], [1, 0]])
FORMS = [
    ("llama", "none"),
    ("mistral", "none"),
    ("qwen2", "none"),
    ("qwen3", "none"),
    ("llama", "fp8"),
    ("qwen2", "int8_wo"),
]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short sequences make the cache grow, and prompts take several runs."""
    monkeypatch.setattr(lane_plan, "BLOCK", 4)
    monkeypatch.setattr(tree_batch, "PREFILL", 3)


def serve(
    decoder: TreeBatchDecoder,
    tree: Tree,
    make_sampler: Callable[[int], Sampler | None],
    typical: Typical | None = None,
    seen: list[list[int]] | None = None,
) -> list[Generation]:
    """All prompts, as slots become free. ``seen`` gets the capacities of every step."""
    results = [Generation() for _ in PROMPTS]
    samplers = [make_sampler(index) for index in range(len(PROMPTS))]
    waiting, active = list(range(len(PROMPTS))), []
    while waiting or active:
        while waiting and decoder.active < decoder.slots:
            index = waiting.pop(0)
            logits, sampler = decoder.admit(PROMPTS[index]), samplers[index]
            results[index].tokens.append(sampler.draw(logits) if sampler else int(logits.argmax()))
            active.append(index)
        last = [results[index].tokens[-1] for index in active]
        for index, new in zip(
            active,
            decode_step(decoder, *draft_heads(decoder, tree, last), [samplers[i] for i in active], typical),
            strict=True,
        ):
            results[index].tokens += new
            results[index].accepted.append(len(new))
        if seen is not None:
            seen.append(decoder.capacities)
        for slot in reversed(range(len(active))):
            if len(results[active[slot]].tokens) >= LIMITS[active[slot]]:
                results[active[slot]].keep(LIMITS[active[slot]])
                decoder.release(slot)
                active[slot] = active[-1]
                active.pop()
    return results


def alone(
    engine: OnnxRuntimeEngine,
    index: int,
    tree: Tree,
    sampler: Sampler | None = None,
    typical: Typical | None = None,
) -> Generation:
    return generate(
        engine, PROMPTS[index], tree, max_new_tokens=LIMITS[index], eos_token_ids=(), sampler=sampler, typical=typical
    )


@pytest.mark.parametrize("traffic", [None, APART], ids=["together", "apart"])
@pytest.mark.parametrize(("family", "quant"), FORMS)
def test_tokens_and_steps_are_those_of_one_sequence(
    family: str, quant: str, traffic: Traffic | None, tiny_engine: Callable[..., Any]
) -> None:
    config = {"head_dim": 32} if family == "qwen3" else {}
    path = tiny_engine(family, quant, drafts_well=quant == "none", **config).path
    engine, decoder = OnnxRuntimeEngine(path), TreeBatchDecoder(path, slots=3, traffic=traffic)
    seen: list[list[int]] = []
    several = serve(decoder, TREE, lambda index: None, seen=seen)
    for index, result in enumerate(several):
        expected = alone(engine, index, TREE)
        assert result.tokens == expected.tokens
        assert result.accepted == expected.accepted
    if quant == "none":
        assert max(max(result.accepted) for result in several) > 1, "a tree of which nothing is accepted tests little"
    assert max(max(lanes) for lanes in seen) > 4, "the cache did not grow"
    assert max(len(lanes) for lanes in seen) == (3 if traffic else 1)


def test_without_a_tree(tiny_engine: Callable[..., Any]) -> None:
    path = tiny_engine().path
    engine, decoder = OnnxRuntimeEngine(path), TreeBatchDecoder(path, slots=4)
    for index, result in enumerate(serve(decoder, AUTOREGRESSIVE, lambda index: None)):
        assert result.tokens == alone(engine, index, AUTOREGRESSIVE).tokens


def test_steps_are_those_of_the_autoregressive_decoder(tiny_engine: Callable[..., Any]) -> None:
    path = tiny_engine().path
    decoders = TreeBatchDecoder(path, slots=2), BatchDecoder(path, slots=2)
    for prompt in PROMPTS[:2]:
        ours, theirs = (decoder.admit(prompt) for decoder in decoders)
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    for tokens in ([1, 2], [7, 7], [40, 3]):
        ours, theirs = (decoder.step(tokens) for decoder in decoders)
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_drawn_tokens_are_those_of_one_sequence(tiny_engine: Callable[..., Any]) -> None:
    path = tiny_engine(drafts_well=True).path
    engine, decoder = OnnxRuntimeEngine(path), TreeBatchDecoder(path, slots=3)
    several = serve(decoder, TREE, lambda index: Sampler(0.7, index) if index % 2 else None)
    for index, result in enumerate(several):
        expected = alone(engine, index, TREE, Sampler(0.7, index) if index % 2 else None)
        assert result.tokens == expected.tokens


def test_typical_acceptance_is_that_of_one_sequence(tiny_engine: Callable[..., Any]) -> None:
    """A greedy sequence beside the drawn ones stays lossless."""
    path, rule = tiny_engine(drafts_well=True).path, Typical(threshold=0.02, alpha=0.5)
    engine, decoder = OnnxRuntimeEngine(path), TreeBatchDecoder(path, slots=3)
    several = serve(decoder, TREE, lambda index: Sampler(30.0, index) if index % 2 else None, rule)
    for index, result in enumerate(several):
        expected = alone(engine, index, TREE, Sampler(30.0, index) if index % 2 else None, rule)
        assert result.tokens == expected.tokens
    drawn = [alone(engine, index, TREE, Sampler(30.0, index)).tokens for index in (1, 3)]
    assert [several[1].tokens, several[3].tokens] != drawn, "drafts stand that were not drawn"
    assert several[2].tokens[: LIMITS[2]] == alone(engine, 2, AUTOREGRESSIVE).tokens


def test_a_prompt_is_read_in_parts_between_steps_of_others(tiny_engine: Callable[..., Any]) -> None:
    """The others step, end and move meanwhile; a dropped prompt leaves nothing."""
    path = tiny_engine().path
    engine, decoder = OnnxRuntimeEngine(path), TreeBatchDecoder(path, slots=4)
    long = [3, 9, 27, 81, 50, 53, 62, 89, 73, 25, 75]
    first = [int(decoder.admit(prompt).argmax()) for prompt in PROMPTS[:3]]
    decoder.begin([5, 6, 7])
    assert decoder.prefill_chunk(2) is None
    decoder.drop()
    decoder.begin(long)
    rows = [[token] for token in first]
    logits = None
    while logits is None:
        for row, new in zip(
            rows, decode_step(decoder, *draft_heads(decoder, AUTOREGRESSIVE, [row[-1] for row in rows])), strict=True
        ):
            row += new
        if len(rows) == 3 and len(rows[0]) > 2:
            decoder.release(0)
            rows = [rows[2], rows[1]]
        logits = decoder.prefill_chunk(3)
    rows.append([int(logits.argmax())])
    for _ in range(4):
        for row, new in zip(
            rows, decode_step(decoder, *draft_heads(decoder, AUTOREGRESSIVE, [row[-1] for row in rows])), strict=True
        ):
            row += new
    for row, prompt in zip(rows, [PROMPTS[2], PROMPTS[1], long], strict=True):
        expected = generate(engine, prompt, AUTOREGRESSIVE, max_new_tokens=len(row), eos_token_ids=())
        assert row == expected.tokens


def test_a_long_sequence_does_not_cost_those_after_it(tiny_engine: Callable[..., Any]) -> None:
    """A step reads all rows of the cache, so it has to shrink again; what is in it stays."""
    path = tiny_engine(max_length=1000, max_position_embeddings=1000).path
    engine, decoder = OnnxRuntimeEngine(path), TreeBatchDecoder(path, slots=3)
    row = [int(decoder.admit(PROMPTS[0]).argmax())]
    decoder.admit([5] * 600)
    grown = decoder.capacities
    decoder.release(1)
    for _ in range(12):
        row += decode_step(decoder, *draft_heads(decoder, AUTOREGRESSIVE, [row[-1]]))[0]
    assert max(grown) >= 600
    assert max(decoder.capacities) < 20
    assert row == generate(engine, PROMPTS[0], AUTOREGRESSIVE, max_new_tokens=13, eos_token_ids=()).tokens


def test_a_long_sequence_runs_apart_and_ends(tiny_engine: Callable[..., Any]) -> None:
    """The others read a few rows; logits come in the order of the slots; lanes that end leave the others as they were."""
    path = tiny_engine(max_length=1000, max_position_embeddings=1000).path
    engine = OnnxRuntimeEngine(path)
    decoder = TreeBatchDecoder(path, slots=4, traffic=Traffic(weights=100, row=1))
    prompts = [[5] * 600, *PROMPTS[:2]]
    rows = [[int(decoder.admit(prompt).argmax())] for prompt in prompts]

    def steps(count: int) -> None:
        for _ in range(count):
            logits = decoder.step([row[-1] for row in rows])
            for row, of_one in zip(rows, logits, strict=True):
                row.append(int(of_one.argmax()))

    steps(12)
    assert sorted(decoder.capacities) == [20, 612]
    decoder.release(0)  # the last slot is the first now
    prompts[0], rows[0] = prompts.pop(), rows.pop()
    steps(4)
    assert len(decoder.capacities) == 1
    for row, prompt in zip(rows, prompts, strict=True):
        expected = generate(engine, prompt, AUTOREGRESSIVE, max_new_tokens=len(row), eos_token_ids=())
        assert row == expected.tokens


def test_refusals(tiny_engine: Callable[..., Any]) -> None:
    decoder = TreeBatchDecoder(tiny_engine().path, slots=1, max_length=4)
    with pytest.raises(ConfigError, match="4 tokens"):
        decoder.admit([1, 2, 3, 4])
    decoder.admit([1, 2, 3])
    assert decoder.remaining(0) == 1
    with pytest.raises(ConfigError, match="in use"):
        decoder.admit([1])
