"""Faults put in on purpose: for each, which check flags it, that the others may stay silent, and that a good one passes.

``tree`` is the tree against its own paths and ``reference`` the engine against transformers, both in selfcheck.check_engine;
``parity`` is the output with Medusa against the output without; ``verify`` reads the TensorRT-LLM checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_export.engines.bench.runner import RunResult, run_prompts
from medusa_export.engines.onnxruntime import engine as engine_module
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine, OnnxRuntimeStep
from medusa_export.engines.verify.selfcheck import CHECK_TREE, check_engine
from medusa_export.exporter.onnx import decoder as onnx_graph
from medusa_export.exporter.verify.checkpoint import verify_trtllm
from medusa_export.exporter.write.trtllm import write_trtllm
from medusa_export.heads.checkpoint import families
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.trees.tree import Tree
from medusa_export.quantize.formats import get_format

TEXTS = [[token % 24 for token in range(5, 45)], [token * 7 % 24 for token in range(30)]]
PROMPTS = [(str(i), "", [1, 20 + i, 7, 7 * i + 3, 11, 12]) for i in range(3)]
CHAIN = Tree.from_choices([[0], [0, 0], [0, 0, 0]])
WIDE = Tree.from_choices([[rank] for rank in range(10)] + [[rank, child] for rank in range(10) for child in range(3)])


def run(made: Any, tree: Tree) -> RunResult:
    return run_prompts(OnnxRuntimeEngine(made.path), tree, PROMPTS, max_new_tokens=32, repeats=1, seed=0)


def verdicts(result: RunResult) -> set[str]:
    return {prompt.verdict for prompt in result.prompts}


def per_step(result: RunResult) -> float:
    return float(np.mean([count for prompt in result.prompts for count in prompt.medusa[0].accepted]))


def findings(made: Any, tree: Tree) -> set[str]:
    """Which checks of an engine have something to say."""
    problems = " ".join(check_engine(made.path, made.model_dir, TEXTS))
    found = {"tree"} if "tree and single steps differ" in problems else set()
    found |= {"reference"} if "engine: KL" in problems else set()
    return found | ({"parity"} if "mismatch" in verdicts(run(made, tree)) else set())


@pytest.fixture
def random_engine(tiny_engine: Callable[..., Any]) -> Any:
    """24 words, so that random heads have paths of a wide tree accepted now and then."""
    return tiny_engine(vocab_size=24, tree=WIDE, num_hidden_layers=2)


class TestHeads:
    tensors = ("1.weight", "0.linear.weight", "0.linear.bias")

    def swap(self, heads_dir: Path) -> None:
        path = heads_dir / "medusa_lm_head.safetensors"
        heads = {name: tensor.clone() for name, tensor in load_file(path).items()}
        for name in self.tensors:
            heads[f"0.{name}"], heads[f"1.{name}"] = heads[f"1.{name}"], heads[f"0.{name}"]
        save_file(heads, path)

    def test_swapped_in_the_engine(self, tiny_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
        """Tokens per step tell, and nothing else can: decoding is lossless whatever the heads say."""
        good = run(tiny_engine(drafts_well=True), CHAIN)
        assert (verdicts(good), per_step(good) > 3) == ({"exact"}, True)
        read = MedusaCheckpoint.read

        def swapped(self: MedusaCheckpoint, name: str) -> torch.Tensor:
            pair = {"medusa_heads.0.": "medusa_heads.1.", "medusa_heads.1.": "medusa_heads.0."}
            return read(self, pair.get(name[:15], name[:15]) + name[15:])

        monkeypatch.setattr(MedusaCheckpoint, "read", swapped)
        made = tiny_engine(drafts_well=True)
        monkeypatch.undo()
        bad = run(made, CHAIN)
        assert per_step(bad) < 1.2
        assert findings(made, CHAIN) == set()
        assert [p.medusa[0].tokens for p in bad.prompts] == [p.medusa[0].tokens for p in good.prompts]

    def test_swapped_in_the_trtllm_checkpoint(self, tiny_engine: Callable[..., Any], tmp_path: Path) -> None:
        made = tiny_engine(drafts_well=True, dtype=torch.float16)
        write_trtllm(tmp_path / "good", made.checkpoint, get_format("none"), None, tree=CHAIN)
        assert verify_trtllm(tmp_path / "good", made.checkpoint) == []
        self.swap(made.heads_dir)
        swapped = MedusaCheckpoint.open(made.model_dir, made.heads_dir)
        problems = verify_trtllm(tmp_path / "good", swapped)
        assert {problem.split(".weight")[0].split(".bias")[0] for problem in problems} == {
            f"medusa_heads.{head}.{part}" for head in (0, 1) for part in ("0.linear", "1")
        }


def test_the_unfaulted_engines_pass(random_engine: Any, tiny_engine: Callable[..., Any]) -> None:
    result = run(random_engine, WIDE)
    assert verdicts(result) == {"exact"}
    assert per_step(result) > 1.3, "nothing accepted: parity would say little about the cache"
    assert findings(random_engine, WIDE) == set()
    assert findings(tiny_engine("llama", "fp8", tree=WIDE), WIDE) == set()
    assert findings(tiny_engine("qwen2", tree=WIDE), WIDE) == set()


class TestTree:
    """Faults in what a tree says of itself, in those that the checks use."""

    def plant(self, monkeypatch: pytest.MonkeyPatch, name: str, wrong: Callable[[Tree], np.ndarray]) -> None:
        for tree in (WIDE, CHECK_TREE):
            monkeypatch.setitem(vars(tree), name, wrong(tree))  # where cached_property keeps it

    def test_wrong_parent(self, random_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """The mask puts every node of the second level under its parent's neighbour."""

        def mask(tree: Tree) -> npt.NDArray[np.bool_]:
            seen, width = tree.mask.copy(), int((tree.depths == 1).sum())
            for node in np.flatnonzero(tree.depths == 2):
                seen[node] = tree.mask[1 + tree.parents[node] % width]
                seen[node, node] = True
            return seen

        self.plant(monkeypatch, "mask", mask)
        assert findings(random_engine, WIDE) == {"tree", "parity"}

    def test_every_node_sees_all_before_it(self, random_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plant(monkeypatch, "mask", lambda tree: np.tri(tree.num_nodes, dtype=bool))
        assert findings(random_engine, WIDE) == {"tree", "parity"}

    def test_position_off_by_one(self, random_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Draft nodes one position late; the root, and with it plain decoding, stays right."""
        self.plant(monkeypatch, "depths", lambda tree: tree.depths + (tree.depths > 0))
        assert findings(random_engine, WIDE) == {"tree", "parity"}


class TestEngine:
    def test_every_position_off_by_one(self, random_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """RoPE sees differences alone: shifting all positions alike is no fault, and shifting those of later blocks is one."""
        run_block = engine_module._Block.run

        def late(self: Any, node_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
            depths = self._depths
            self._depths = depths + (self.engine.length > 0)
            try:
                return run_block(self, node_ids)
            finally:
                self._depths = depths

        monkeypatch.setattr(engine_module._Block, "run", late)
        assert findings(random_engine, WIDE) == {"reference"}  # the same with and without Medusa

    def test_stale_row(self, random_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Accepted rows left where the tree had them: only decoding on behind them shows it."""

        def commit(self: OnnxRuntimeStep, path: npt.NDArray[np.int64]) -> None:
            self._engine.length += len(path)
            self._engine._hidden[0] = self._block.hidden[path[-1]]

        monkeypatch.setattr(OnnxRuntimeStep, "commit", commit)
        assert findings(random_engine, WIDE) == {"parity"}

    def test_hidden_state_of_another_node(
        self, tiny_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The heads read the root instead of the last kept row: tokens per step tell."""
        made, keep = tiny_engine(drafts_well=True), OnnxRuntimeStep.commit

        def stale(self: OnnxRuntimeStep, path: npt.NDArray[np.int64]) -> None:
            keep(self, path)
            self._engine._hidden[0] = self._block.hidden[0]

        good = per_step(run(made, CHAIN))
        monkeypatch.setattr(OnnxRuntimeStep, "commit", stale)
        assert findings(made, CHAIN) == set()
        assert per_step(run(made, CHAIN)) < 0.8 * good


class TestWeights:
    def edit(self, made: Any, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
        """Rewrite one initializer of decoder.onnx."""
        path = made.path / "decoder.onnx"
        model = onnx.load(path)
        (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
        tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor)), name))
        onnx.save(model, path)

    @pytest.mark.parametrize("factor", [0.25, 4.0])
    def test_scale_in_the_fp8_engine(self, factor: float, tiny_engine: Callable[..., Any]) -> None:
        made = tiny_engine("llama", "fp8", tree=WIDE)
        assert findings(made, WIDE) == set()
        for layer in range(2):
            self.edit(
                made, f"{families.DOWN_PROJ.format(layer)}.weight_scale", lambda scale: scale * np.float32(factor)
            )
        assert findings(made, WIDE) == {"reference"}

    def test_scale_in_the_trtllm_checkpoint(self, tiny_engine: Callable[..., Any], tmp_path: Path) -> None:
        made = tiny_engine("llama", "fp8", dtype=torch.float16)
        write_trtllm(tmp_path / "out", made.checkpoint, get_format("fp8"), made.scales, tree=CHAIN)
        assert verify_trtllm(tmp_path / "out", made.checkpoint) == []
        rank = tmp_path / "out" / "rank0.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(rank).items()}
        tensors["transformer.layers.1.mlp.proj.weights_scaling_factor"] *= 1.2
        save_file(tensors, rank)
        (problem,) = verify_trtllm(tmp_path / "out", made.checkpoint)
        assert problem.startswith("model.layers.1.mlp.down_proj.weight")

    @pytest.mark.parametrize("quant", ["none", "fp8", "int8_wo"])
    def test_qkv_in_the_wrong_order(
        self, quant: str, tiny_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Key and value change places in every layer; the tree, and parity, agree with themselves."""
        assert findings(tiny_engine("mistral", quant, tree=WIDE), WIDE) == set()
        monkeypatch.setattr(onnx_graph.families, "K_PROJ", families.V_PROJ)
        monkeypatch.setattr(onnx_graph.families, "V_PROJ", families.K_PROJ)
        made = tiny_engine("mistral", quant, tree=WIDE)
        monkeypatch.undo()
        assert findings(made, WIDE) == {"reference"}

    def test_qkv_in_the_wrong_order_in_the_trtllm_checkpoint(
        self, tiny_engine: Callable[..., Any], tmp_path: Path
    ) -> None:
        made = tiny_engine("mistral", dtype=torch.bfloat16)
        write_trtllm(tmp_path / "out", made.checkpoint, get_format("none"), None, tree=CHAIN)
        assert verify_trtllm(tmp_path / "out", made.checkpoint) == []
        rank = tmp_path / "out" / "rank0.safetensors"
        tensors = load_file(rank)
        name = "transformer.layers.0.attention.qkv.weight"
        q, k, v = tensors[name].split([64, 32, 32])
        tensors[name] = torch.cat([q, v, k])
        save_file(tensors, rank)
        assert [problem.split(".weight")[0] for problem in verify_trtllm(tmp_path / "out", made.checkpoint)] == [
            f"model.layers.0.self_attn.{x}_proj" for x in "kv"
        ]
