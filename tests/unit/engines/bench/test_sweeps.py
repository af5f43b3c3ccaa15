"""Sweeps: the same answers at every batch size, prompts of exactly the length asked for, figures on a known clock."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.engines.bench import sweeps
from medusa_export.engines.bench.report import sweep_rows
from medusa_export.engines.bench.sweeps import batch_sweep, length_sweep, require_sweeps, serve, stretched
from medusa_export.engines.decoding.generate import generate
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE
from medusa_export.engines.onnxruntime.batch_engine import TreeBatchDecoder
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.heads.trees.tree import Tree

PROMPTS = [[3, 4, 5], [9, 8, 7, 6, 5, 4, 3], [11], [5, 5, 12, 13]]
TREE = Tree.from_choices([[0], [1], [0, 0]])


@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("tree", [AUTOREGRESSIVE, TREE], ids=["none", "tree"])
def test_answers_do_not_depend_on_the_batch(batch: int, tree: Tree, tiny_engine: Callable[..., Any]) -> None:
    path = tiny_engine(drafts_well=True, max_length=32).path
    engine, decoder = OnnxRuntimeEngine(path), TreeBatchDecoder(path, slots=4)
    result = serve(decoder, tree, PROMPTS, batch=batch, max_new_tokens=29)  # the longest one fills the context
    for tokens, prompt in zip(result.tokens, PROMPTS, strict=True):
        alone = generate(engine, prompt, AUTOREGRESSIVE, max_new_tokens=29, eos_token_ids=engine.info.eos_token_ids)
        assert tokens == alone.tokens
    assert result.steps <= result.sequence_steps <= batch * result.steps
    assert (result.sequence_steps == result.decoded) == (tree is AUTOREGRESSIVE)
    assert decoder.active == 0


@pytest.mark.parametrize("tree", [AUTOREGRESSIVE, TREE], ids=["none", "tree"])
def test_answers_that_the_prefill_gives_are_not_decoded(tree: Tree, tiny_engine: Callable[..., Any]) -> None:
    """Of one token, by the limit or because it ends the text: nothing comes behind it, and their slots go to the others."""
    decoder = TreeBatchDecoder(tiny_engine(drafts_well=True).path, slots=3)
    whole = serve(decoder, tree, PROMPTS, batch=2, max_new_tokens=6)
    limited = serve(decoder, tree, PROMPTS, batch=3, max_new_tokens=1)
    assert (limited.tokens, limited.steps, decoder.active) == ([tokens[:1] for tokens in whole.tokens], 0, 0)
    ends = whole.tokens[0][0]
    decoder.info = replace(decoder.info, eos_token_ids=(ends,))
    found = serve(decoder, tree, PROMPTS, batch=2, max_new_tokens=6)
    until = [tokens[: tokens.index(ends) + 1] if ends in tokens else tokens for tokens in whole.tokens]
    assert (found.tokens, found.tokens[0], decoder.active) == (until, [ends], 0)
    assert max(map(len, until)) > 1


def test_a_sweep_without_steps(tiny_engine: Callable[..., Any]) -> None:
    decoder = TreeBatchDecoder(tiny_engine(drafts_well=True).path, slots=2)
    (row,) = batch_sweep(decoder, TREE, PROMPTS, [2], max_new_tokens=1)
    assert (row["speedup"], row["tokens_per_second"]) == (None, {"baseline": None, "medusa": None})
    assert (row["tokens_per_step"], row["equal_outputs"]) == (1.0, 4)
    assert sweep_rows("batch", [row])[1] == ("2", "-", "-", "-", "1.00", "4 of 4")


def test_throughput_on_a_known_clock(tiny_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of n nodes takes n milliseconds, whatever the batch."""
    now = [0.0]
    monkeypatch.setattr(sweeps.time, "perf_counter", lambda: now[0])
    decoder = TreeBatchDecoder(tiny_engine(drafts_well=True).path, slots=2)
    verify = decoder.verify

    def slow(tree: Tree, node_ids: Any) -> Any:
        now[0] += 1e-3 * tree.num_nodes
        return verify(tree, node_ids)

    monkeypatch.setattr(decoder, "verify", slow)
    done: list[tuple[int, int]] = []
    rows = batch_sweep(
        decoder, TREE, PROMPTS[:2], [1, 2], max_new_tokens=13, repeats=2, progress=lambda *at: done.append(at)
    )
    assert [row["batch"] for row in rows] == [1, 2]
    assert [row["equal_outputs"] for row in rows] == [2, 2]
    assert rows[0]["tokens_per_second"]["baseline"] == pytest.approx(1000)
    assert rows[0]["step_ms"] == {"baseline": pytest.approx(1), "medusa": pytest.approx(4)}
    assert rows[0]["speedup"] == pytest.approx(rows[0]["tokens_per_step"] / 4, rel=1e-3)
    assert rows[1]["tokens_per_second"]["baseline"] == pytest.approx(2000)
    assert rows[0]["tokens_per_step"] > 1
    assert done[-1] == (8, 8)


def test_lengths(tiny_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OnnxRuntimeEngine(tiny_engine().path)
    seen = set()
    prefill = engine.prefill
    monkeypatch.setattr(engine, "prefill", lambda ids: seen.add(len(ids)) or prefill(ids))
    rows = length_sweep(engine, TREE, PROMPTS, [2, 40], max_new_tokens=5)
    assert seen == {2, 40}
    assert [row["prompt_length"] for row in rows] == [2, 40]
    assert all(row["speedup_ci95"][0] <= row["speedup"] <= row["speedup_ci95"][1] for row in rows)


def test_a_length_at_which_nothing_is_decoded(tiny_engine: Callable[..., Any]) -> None:
    """Every token ends an answer: there is no speed-up to show, and the file stays JSON."""
    engine = OnnxRuntimeEngine(tiny_engine().path)
    engine.info = replace(engine.info, eos_token_ids=tuple(range(97)))
    rows = length_sweep(engine, TREE, PROMPTS, [4], max_new_tokens=5)
    assert json.dumps(rows, allow_nan=False)
    assert rows == [{"prompt_length": 4, "tokens_per_step": None, "speedup": None, "speedup_ci95": None}]
    assert sweep_rows("length", rows)[1] == ("4", "-", "-", "-")


def test_a_stretched_prompt_ends_as_it_did() -> None:
    assert stretched(PROMPTS, 1, 3) == [5, 4, 3]
    long = stretched(PROMPTS, 1, 12)
    assert long[-10:] == [*PROMPTS[0], *PROMPTS[1]]
    assert long[:2] == PROMPTS[3][-2:]


@pytest.mark.parametrize(
    ("batches", "lengths", "message"),
    [([0], [], "--sweep-batch"), ([5], [], "--sweep-batch"), ([], [0], "--sweep-length"), ([], [61], "--sweep-length")],
)
def test_refusals(batches: list[int], lengths: list[int], message: str) -> None:
    require_sweeps([1, 4], [1, 60], prompts=4, longest=60)
    with pytest.raises(ConfigError, match=message):
        require_sweeps(batches, lengths, prompts=4, longest=60)
