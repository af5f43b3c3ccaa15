"""The ONNX Runtime engine against the PyTorch oracle: same tokens, same accepted counts, and a cache that is what a prefill makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch

from medusa_export.core.errors import ConfigError
from medusa_export.engines.decoding.generate import generate
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE, Generation
from medusa_export.engines.onnxruntime.batch_engine import TreeBatchDecoder
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.engines.verify.selfcheck import tree_error
from medusa_export.exporter.onnx.heads import write_heads
from medusa_export.heads.checkpoint.medusa_checkpoint import load_reference
from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.decoding.accept import accept_greedy
from medusa_export.heads.decoding.reference import greedy, medusa_decode
from medusa_export.heads.decoding.sampling import Sampler
from medusa_export.heads.trees.tree import Tree, load_tree

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}), ("mistral", {"num_key_value_heads": 1}), ("qwen2", {}), ("qwen3", {"head_dim": 32}),
]  # fmt: skip
PROMPT = [1, 20, 7, 7, 11, 12, 23, 3]
TREE = Tree.from_choices([[0], [1], [0, 0], [0, 1], [1, 0], [1, 0, 0]])
NODE_IDS = np.array([5, 10, 20, 21, 22, 21, 13])


def small(tiny_engine: Callable[..., Any], family: str, **config: Any) -> tuple[Any, OnnxRuntimeEngine]:
    """A model of 24 words, so that random heads are right now and then, with heads in float32 as the oracle's are."""
    made = tiny_engine(family, vocab_size=24, heads={"num_heads": 4}, **config)
    top_k = EngineInfo.load(made.path).top_k
    write_heads(made.path, made.checkpoint, top_k=top_k, draft_vocab=None, int8=False)
    return made, OnnxRuntimeEngine(made.path)


def decode(engine: OnnxRuntimeEngine, tree: Tree, new: int = 40, eos: Sequence[int] = ()) -> Generation:
    return generate(engine, PROMPT, tree, max_new_tokens=new, eos_token_ids=eos)


@pytest.mark.parametrize(("family", "config"), FAMILIES, ids=[family for family, _ in FAMILIES])
@pytest.mark.parametrize("quant", ["none", "fp8"])
def test_no_tree_changes_a_token(
    family: str, config: dict[str, Any], quant: str, tiny_engine: Callable[..., Any]
) -> None:
    _, engine = small(tiny_engine, family, quant=quant, **config)
    expected = decode(engine, AUTOREGRESSIVE)
    assert set(expected.accepted) == {1}
    for tree in (load_tree("cpu-1"), load_tree("cpu-8"), load_tree("medusa-63"), TREE):
        assert decode(engine, tree).tokens == expected.tokens


@pytest.mark.parametrize(("family", "config"), FAMILIES, ids=[family for family, _ in FAMILIES])
@pytest.mark.parametrize("preset", ["none", "cpu-8", "medusa-63"])
def test_equals_the_oracle(family: str, config: dict[str, Any], preset: str, tiny_engine: Callable[..., Any]) -> None:
    made, engine = small(tiny_engine, family, **config)
    model, tree = load_reference(made.model_dir, torch.float32), load_tree(preset)
    tokens, accepted = medusa_decode(model, made.checkpoint, PROMPT, tree, max_new_tokens=40, eos_token_ids=())
    ours = decode(engine, tree)
    assert (ours.tokens, ours.accepted) == (tokens, accepted)
    assert preset == "none" or len(set(accepted)) > 1, "nothing was ever accepted: this would prove little"
    eos = [tokens[17]]
    expected = medusa_decode(model, made.checkpoint, PROMPT, tree, max_new_tokens=40, eos_token_ids=eos)
    ours = decode(engine, tree, eos=eos)
    assert (ours.tokens, ours.accepted, ours.finish_reason) == (*expected, "stop")


@pytest.mark.parametrize("layers", [1, 2])
def test_good_heads_give_long_steps(layers: int, tiny_engine: Callable[..., Any]) -> None:
    """With the heads as an export writes them, in 8 bits."""
    made = tiny_engine(drafts_well=layers == 1, heads={"num_layers": layers})
    model, tree = load_reference(made.model_dir, torch.float32), Tree.from_choices([[0], [0, 0], [0, 0, 0]])
    ours = decode(OnnxRuntimeEngine(made.path), tree)
    assert ours.tokens == greedy(model, PROMPT, max_new_tokens=40, eos_token_ids=())
    assert (np.mean(ours.accepted) > 3.5) == (layers == 1)  # random heads of two layers are wrong, and lossless


@pytest.mark.parametrize("path", [[0], [0, 1], [0, 1, 3], [0, 2], [0, 1, 4], [0, 2, 5], [0, 2, 5, 6]])
def test_kept_rows_are_those_of_a_prefill(path: list[int], tiny_engine: Callable[..., Any]) -> None:
    made = tiny_engine("qwen3", head_dim=32)
    engine, fresh = OnnxRuntimeEngine(made.path), OnnxRuntimeEngine(made.path)
    engine.prefill(PROMPT)
    step = engine.prepare(TREE)
    next_ids = step.verify(NODE_IDS).copy()
    step.commit(np.array(path))
    text = [*PROMPT, *NODE_IDS[path].tolist()]
    assert fresh.prefill(text) == next_ids[path[-1]]
    assert engine.length == fresh.length == len(text)
    np.testing.assert_allclose(engine.rows[:, : len(text)], fresh.rows[:, : len(text)], atol=1e-4)
    assert engine.draft(3).tolist() == fresh.draft(3).tolist(), "the heads read the last kept row"
    for _ in range(3):  # and what follows is the same
        steps = engine.prepare(TREE), fresh.prepare(TREE)
        ids = [step.verify(NODE_IDS[::-1]).tolist() for step in steps]
        assert ids[0] == ids[1]
        for step in steps:
            step.commit(np.array([0, 2, 5]))


@pytest.fixture
def of_integers(tiny_engine: Callable[..., Any]) -> OnnxRuntimeEngine:
    made = tiny_engine(quant="int8_sq", dtype=torch.bfloat16, vocab_size=24, heads={"num_heads": 4}, max_length=64)
    return OnnxRuntimeEngine(made.path)


def test_rows_do_not_change_a_number(of_integers: OnnxRuntimeEngine) -> None:
    """Bit by bit: one row at a time, eight rows, and the nodes of a tree."""
    engine, text = of_integers, [(5 * index) % 24 for index in range(40)]
    one, eight = (np.concatenate(list(engine.score(text, chunk=chunk, start=16))) for chunk in (1, 8))
    assert np.array_equal(one, eight)
    assert tree_error(engine, text[:20], TREE) == 0
    drawn = decode(engine, AUTOREGRESSIVE, new=48).tokens
    for tree in (load_tree("cpu-8"), TREE):
        assert decode(engine, tree, new=48).tokens == drawn


def test_the_last_row_of_the_context(of_integers: OnnxRuntimeEngine) -> None:
    """Where there is no room for the padding of a single row, it goes alone."""
    text = [(5 * index) % 24 for index in range(64)]
    logits = list(of_integers.score(text, chunk=1, start=60))
    assert [part.shape for part in logits] == [(1, 24)] * 4
    assert np.isfinite(np.concatenate(logits)).all()
    assert of_integers.length == 64


def test_two_trees_alternate(tiny_engine: Callable[..., Any]) -> None:
    _, engine = small(tiny_engine, "llama")
    expected = decode(engine, AUTOREGRESSIVE).tokens
    tokens, trees = [engine.prefill(PROMPT)], cycle([TREE, AUTOREGRESSIVE, load_tree("cpu-8")])
    while len(tokens) < 40:
        tree = next(trees)
        step = engine.prepare(tree)
        assert engine.prepare(tree) is step
        node_ids = np.array([tokens[-1], *engine.draft(max(tree.depth, 1))[tree.heads_and_ranks]])
        next_ids = step.verify(node_ids)
        path, _ = accept_greedy(tree, node_ids, next_ids)
        tokens += next_ids[path].tolist()
        step.commit(path)
    assert tokens[:40] == expected


def test_prefill_forgets_everything(tiny_engine: Callable[..., Any]) -> None:
    _, engine = small(tiny_engine, "llama")
    first = decode(engine, TREE)
    generate(engine, PROMPT[::-1] * 4, TREE, max_new_tokens=30, eos_token_ids=())
    again = decode(engine, TREE)
    assert (first.tokens, first.accepted) == (again.tokens, again.accepted)


@pytest.mark.parametrize("preset", ["none", "cpu-8", "medusa-63"])
@pytest.mark.parametrize("max_length", [16, 33])
def test_context_limit(preset: str, max_length: int, tiny_engine: Callable[..., Any]) -> None:
    made, engine = small(tiny_engine, "llama", max_length=max_length)
    ours = decode(engine, load_tree(preset), 60)
    room = max_length - len(PROMPT)
    assert (ours.finish_reason, len(ours.tokens)) == ("context", room + 1)
    model = load_reference(made.model_dir, torch.float32)
    assert ours.tokens == greedy(model, PROMPT, max_new_tokens=room + 1, eos_token_ids=())
    with pytest.raises(ConfigError, match=f"1 .. {max_length - 1}"):
        generate(engine, [1] * max_length, AUTOREGRESSIVE, max_new_tokens=1, eos_token_ids=())


@pytest.mark.parametrize("start", [0, 1, 8])
def test_score_in_any_chunks(start: int, tiny_engine: Callable[..., Any]) -> None:
    made = tiny_engine("qwen2")
    engine, text = OnnxRuntimeEngine(made.path), [*range(3, 40)]
    with torch.no_grad():
        model = load_reference(made.model_dir, torch.float32)
        expected = model(torch.tensor([text])).logits[0, start:].numpy()  # [S - start, V]
    for chunk in (1, 2, 5, 64):
        blocks = list(engine.score(text, chunk=chunk, start=start))
        assert {len(block) for block in blocks[:-1]} <= {chunk}
        np.testing.assert_allclose(np.concatenate(blocks), expected, atol=1e-3, rtol=0)
        assert engine.length == len(text)


def test_tree_logits(tiny_engine: Callable[..., Any]) -> None:
    engine = OnnxRuntimeEngine(tiny_engine("llama").path)
    logits = engine.tree_logits(TREE, PROMPT, NODE_IDS.tolist())  # [N, V]
    for path in TREE.retrieve_indices:
        nodes = path[path >= 0]
        text = [*PROMPT, *NODE_IDS[nodes].tolist()]
        alone = np.concatenate(list(engine.score(text, chunk=64)))[len(PROMPT) :]
        np.testing.assert_allclose(logits[nodes], alone, atol=1e-4, rtol=0)


def test_backend_time_is_part_of_the_whole(tiny_engine: Callable[..., Any]) -> None:
    _, engine = small(tiny_engine, "llama")
    before = engine.backend_seconds
    result = decode(engine, TREE)
    spent = (engine.backend_seconds - before) * 1e3
    assert 0 < result.backend_ms < spent < result.total_ms  # result.backend_ms leaves out the prefill
    assert result.backend_ms < result.decode_ms


class TestRefusals:
    def test_no_engine(self, tmp_path: Any) -> None:
        with pytest.raises(ConfigError, match=r"engine\.json"):
            OnnxRuntimeEngine(tmp_path)

    @pytest.mark.parametrize("file", ["decoder.onnx", "heads-2.onnx"])
    def test_damaged_graph(self, file: str, tiny_engine: Callable[..., Any]) -> None:
        path = tiny_engine().path
        (path / file).write_bytes((path / file).read_bytes()[:100])
        with pytest.raises(ConfigError, match=f"{file}.*export again"):
            OnnxRuntimeEngine(path).draft(2)

    @pytest.mark.parametrize("file", ["decoder.onnx", "heads-2.onnx", "decoder-batch.onnx"])
    def test_a_graph_that_is_not_there(self, file: str, tiny_engine: Callable[..., Any]) -> None:
        """Of an engine that an older version wrote: said once, without ONNX Runtime's words."""
        path = tiny_engine().path
        (path / file).unlink()

        def use() -> None:
            OnnxRuntimeEngine(path).draft(2)
            TreeBatchDecoder(path, slots=2)

        with pytest.raises(ConfigError) as raised:
            use()
        expected = "expected a graph of this version's engines; export again"
        assert str(raised.value) == f"{path / file}: got no such file or directory; {expected}"

    def test_another_number_of_threads(self, tiny_engine: Callable[..., Any]) -> None:
        path = tiny_engine().path
        OnnxRuntimeEngine(path)
        with pytest.raises(ConfigError, match="one value a process"):
            OnnxRuntimeEngine(path, threads=7)


@pytest.mark.parametrize("tree", ["cpu-1", "cpu-8"])
def test_the_same_seed_is_the_same_text(tree: str, tiny_engine: Callable[..., Any]) -> None:
    """Drawn with a tree and without: the same tokens, in fewer steps; another seed is another text."""
    engine = OnnxRuntimeEngine(tiny_engine(drafts_well=True).path)
    chosen, texts, steps = load_tree(tree), [], 0
    for seed in range(6):
        results = [
            generate(engine, [5, 9, 11], mode, max_new_tokens=40, eos_token_ids=(), sampler=Sampler(12.0, seed))
            for mode in (AUTOREGRESSIVE, chosen)
        ]
        assert results[0].tokens == results[1].tokens
        texts.append(results[0].tokens)
        steps += len(results[1].accepted)
    assert len({tuple(text) for text in texts}) == 6
    assert steps < 6 * 39
