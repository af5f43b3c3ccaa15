"""TensorRtEngine's buffers, shapes, row moves and protocol, on ONNX Runtime in TensorRT's place (OnnxDevice): no GPU was at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from medusa_export.core.errors import ConfigError
from medusa_export.engines.backends import open_engine
from medusa_export.engines.decoding.drafters import TreeDrafter
from medusa_export.engines.decoding.generate import generate
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE
from medusa_export.engines.tensorrt.emulation.onnx_device import OnnxDevice
from medusa_export.engines.tensorrt.engine import TensorRtEngine
from medusa_export.engines.verify import selfcheck
from medusa_export.engines.verify.selfcheck import check_engine, tree_error
from medusa_export.heads.checkpoint.medusa_checkpoint import load_reference
from medusa_export.heads.decoding.reference import greedy, medusa_decode
from medusa_export.heads.trees.tree import Tree, load_tree

PROMPT = [1, 40, 7, 7, 61, 12, 90, 3, 55, 28]


@pytest.fixture
def made(portable: Callable[..., Any]) -> Callable[..., Any]:
    """``made(...) -> (engine, checkpoint, directory)``; see ``portable``."""

    def make(family: str = "llama", dtype: str = "float16") -> Any:
        written = portable(family, dtype)
        engine = TensorRtEngine(written.engine_dir, OnnxDevice(written.onnx_dir))
        return engine, written.checkpoint, written.model_dir.parent

    return make


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_decoding_is_the_oracles(family: str, made: Callable[..., Any]) -> None:
    """Tokens and accepted counts of plain decoding and of the tree, against PyTorch without any cache under the tree."""
    engine, checkpoint, out = made(family)
    model, tree = load_reference(out / "model", torch.float32), load_tree("cpu-8")
    plain = generate(engine, PROMPT, AUTOREGRESSIVE, max_new_tokens=24, eos_token_ids=())
    with_tree = generate(engine, PROMPT, tree, max_new_tokens=24, eos_token_ids=())
    assert plain.tokens == greedy(model, PROMPT, max_new_tokens=24, eos_token_ids=())
    tokens, accepted = medusa_decode(model, checkpoint, PROMPT, tree, max_new_tokens=24, eos_token_ids=())
    assert with_tree.tokens == tokens == plain.tokens
    assert with_tree.accepted == accepted
    assert max(accepted) > 2, "paths are accepted, so rows are moved"


def test_bfloat16(made: Callable[..., Any]) -> None:
    """In float32 arithmetic on bfloat16 weights, see onnx_lift."""
    engine, _, out = made("qwen3", dtype="bfloat16")
    model = load_reference(out / "model", torch.bfloat16).float()
    plain, with_tree = (
        generate(engine, PROMPT, tree, max_new_tokens=20, eos_token_ids=()).tokens
        for tree in (AUTOREGRESSIVE, load_tree("cpu-8"))
    )
    assert plain == with_tree == greedy(model, PROMPT, max_new_tokens=20, eos_token_ids=())


def test_the_context_is_filled_to_the_end(made: Callable[..., Any]) -> None:
    """The last steps have no room for the tree; a tree bound there is run on rows that are not there yet."""
    engine, _, _ = made()
    plain = generate(engine, PROMPT, AUTOREGRESSIVE, max_new_tokens=200, eos_token_ids=())
    with_tree = generate(engine, PROMPT, load_tree("cpu-8"), max_new_tokens=200, eos_token_ids=())
    assert plain.finish_reason == with_tree.finish_reason == "context"
    assert with_tree.tokens == plain.tokens[: len(with_tree.tokens)]
    assert len(plain.tokens) == 64 - len(PROMPT) + 1


def test_binding_in_the_middle_changes_nothing(made: Callable[..., Any]) -> None:
    """Runs while a step is bound, as a capture needs, leave cache, length and hidden state alone."""
    engine, _, _ = made()
    engine.prefill(PROMPT)
    rows, hidden, drafts = engine.kv[:, :, : len(PROMPT)].clone(), engine.hidden.clone(), engine.draft(3).copy()
    for name in ("cpu-3", "cpu-4", "medusa-63"):
        engine.prepare(Tree.from_choices(choice for choice in load_tree(name).choices if len(choice) < 3))
    assert torch.equal(rows, engine.kv[:, :, : len(PROMPT)])
    assert torch.equal(hidden, engine.hidden)
    assert int(engine.past) == engine.length == len(PROMPT)
    assert engine.draft(3).tolist() == drafts.tolist()


def test_keep_moves_the_path(made: Callable[..., Any]) -> None:
    engine, _, _ = made()
    engine.prefill(PROMPT)
    tree = load_tree("cpu-8")
    step = engine.prepare(tree)
    step.verify(np.arange(10, 10 + tree.num_nodes))
    before, at = engine.kv.clone(), len(PROMPT)
    path = next(row[row >= 0] for row in tree.retrieve_indices if len(row[row >= 0]) == 3 and row[1] == 1)
    step.commit(path[:2])
    assert torch.equal(engine.kv[:, :, at : at + 2], before[:, :, at + path[:2]])
    assert torch.equal(engine.kv[:, :, :at], before[:, :, :at])
    assert (engine.length, int(engine.past)) == (at + 2, at + 2)
    assert torch.equal(engine.hidden[0], step.block.hidden[path[1]])


def test_scores(made: Callable[..., Any]) -> None:
    engine, _, out = made()
    model: Any = load_reference(out / "model", torch.float32)
    text = [*PROMPT, *range(60, 80)]
    with torch.no_grad():
        expected = model(torch.tensor([text])).logits[0].numpy()
    for chunk, start in ((1, 5), (7, 0), (64, 3)):  # in float16 all of them are 0.0017 standard deviations off
        logits = np.concatenate(list(engine.score(text, chunk=chunk, start=start)))
        np.testing.assert_allclose(logits, expected[start:], atol=0.01 * expected.std())
    assert tree_error(engine, text) < 0.01 * expected.std()
    np.testing.assert_allclose(engine.prefill_logits(text), expected[-1], atol=0.01 * expected.std())


def test_few_integers_a_step(made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes to the device goes through staged buffers; what comes back are next tokens and drafts."""
    engine, _, _ = made()
    staged: list[int] = []
    original = engine.device.staged
    monkeypatch.setattr(engine.device, "staged", lambda size: staged.append(size) or original(size))
    tree = load_tree("cpu-8")
    engine.prefill(PROMPT)
    staged.clear()
    engine.prepare(tree)
    assert sorted(staged) == sorted([tree.num_nodes, tree.depth + 3])


def test_a_step_is_bound_once_and_brings_back_next_tokens_and_drafts(
    made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is bound as fixed is what becomes a CUDA graph on a GPU; what goes through Tensor.cpu() is copied to the host there."""
    engine, _, _ = made()
    bound: list[bool] = []
    copied: list[tuple[int, ...]] = []
    bind, cpu = engine.decoder.bind, torch.Tensor.cpu
    monkeypatch.setattr(engine.decoder, "bind", lambda *given, fixed: bound.append(fixed) or bind(*given, fixed=fixed))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copied.append(tuple(tensor.shape)) or cpu(tensor))
    tree = load_tree("cpu-8")
    result = generate(engine, PROMPT, tree, max_new_tokens=24, eos_token_ids=())
    steps = len(result.accepted)
    assert steps > 3
    assert bound == [True, False], "one for all steps, before anything is timed, and the prompt's"
    assert copied == [(1,), *[(tree.depth, engine.info.top_k), (tree.num_nodes,)] * steps]


def test_trees_that_do_not_fit(made: Callable[..., Any]) -> None:
    engine, _, _ = made()
    wide = Tree.from_choices([[a] for a in range(10)] + [[a, b] for a in range(8) for b in range(8)])
    with pytest.raises(ConfigError, match="75 nodes, the root included; expected at most 64 in this engine"):
        engine.prepare(wide)
    with pytest.raises(ConfigError, match="top-11"):
        TreeDrafter([Tree.from_choices([[rank] for rank in range(11)])], engine.info)


def test_without_a_gpu_there_is_one_line(made: Callable[..., Any]) -> None:
    _, _, out = made()
    with pytest.raises(ConfigError, match=r"rank0.engine: got no NVIDIA GPU here; expected one of sm89; run it there"):
        open_engine(out / "engine")


def test_the_check_of_an_export_runs_the_graphs(made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, out = made()
    check = replace(selfcheck.CHECKS["tensorrt"], files=lambda engine_dir: [])
    monkeypatch.setitem(selfcheck.CHECKS, "tensorrt", check)
    texts = [PROMPT, [3, 50, 9, 22, 4, 4]]
    assert check_engine(out / "engine", out / "model", texts) == []
    data = out / "onnx" / "decoder.onnx.data"
    data.write_bytes(bytes(data.stat().st_size))
    (problem,) = check_engine(out / "engine", out / "model", texts)
    assert "KL" in problem
