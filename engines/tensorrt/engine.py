"""TensorRT engines behind the step protocol: the KV cache stays on the device, and a step takes and gives a few integers.

A step is three runs of fixed shapes, each a CUDA graph: draft, verify, keep. Up go the tokens of the nodes and the accepted path,
down come drafts and next tokens. How long the cache is, the device knows by itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from medusa_export.core.errors import ConfigError
from medusa_export.core.json_fields import read_json
from medusa_export.engines.tensorrt.build import DECODER_ENGINE, HEADS_ENGINE
from medusa_export.engines.tensorrt.device import CudaDevice, Device
from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.trees.tree import Tree

if TYPE_CHECKING:
    import torch  # noqa: F401

PREFILL, STEP = 0, 1  # profiles, see BuildRequest
CAUSAL = Tree(())


class TensorRtEngine:
    """Batch 1. See :class:`medusa_export.engines.decoding.protocols.StepEngine` for the methods.

    Args:
        engine_dir: with engine.json, rank0.engine, heads.engine and their sidecars.
        device: where it runs; None takes this machine's GPU.
    """

    def __init__(self, engine_dir: Path, device: Device | None = None) -> None:
        import torch

        self.info = info = EngineInfo.load(engine_dir)
        built = read_json(engine_dir / f"{Path(DECODER_ENGINE).stem}.json")
        self.max_nodes: int = built["profiles"][STEP]["shapes"]["output_rows"][2][0]
        self.device = CudaDevice(engine_dir) if device is None else device
        self.decoder = self.device.load(DECODER_ENGINE)
        place, integer = self.device.place, torch.int64
        shape = (2 * info.num_hidden_layers, info.num_key_value_heads, info.max_length, info.head_dim)
        self.kv = torch.zeros(shape, dtype=self.decoder.dtype("past_key_values.0.key"), device=place)
        self.past = torch.zeros(1, dtype=integer, device=place)
        self.hidden = torch.zeros((1, info.hidden_size), dtype=self.decoder.dtype("hidden_states"), device=place)
        self.drafts = torch.zeros((info.max_depth, info.top_k), dtype=integer, device=place)
        if info.max_depth:
            heads = self.device.load(HEADS_ENGINE)
            self._draft = heads.bind({"hidden_states": self.hidden, "draft_ids": self.drafts}, 0, fixed=True)
        self._blocks: dict[int, Block] = {}
        self._steps: dict[int, tuple[Tree, TensorRtStep]] = {}  # by id, which holds as long as the tree is kept
        self.length, self.backend_seconds = 0, 0.0

    def prefill(self, input_ids: Sequence[int]) -> int:
        return int(self._prefill(input_ids).next_ids[0])

    def prefill_logits(self, input_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        return self._prefill(input_ids).host_logits()[0, : self.info.sampled]

    def _prefill(self, input_ids: Sequence[int]) -> Block:
        self.rewind(0)
        size = len(input_ids)
        block = Block(self, CAUSAL, size, [size - 1], PREFILL)
        block.run(np.asarray(input_ids, dtype=np.int64))
        self.hidden.copy_(block.hidden)
        self._set_length(size)
        return block

    def prepare(self, tree: Tree) -> TensorRtStep:
        if id(tree) not in self._steps:
            self._require(tree)
            self._steps[id(tree)] = tree, TensorRtStep(self, tree)
        return self._steps[id(tree)][1]

    def open_heads(self, depth: int) -> None:
        """All heads are one engine, which is open."""

    def draft(self, depth: int) -> npt.NDArray[np.int64]:
        start = time.perf_counter()
        self._draft()
        drafts: npt.NDArray[np.int64] = self.drafts[:depth].cpu().numpy()
        self.backend_seconds += time.perf_counter() - start
        return drafts

    def rewind(self, length: int) -> None:
        self._set_length(min(length, self.length))

    def tree_logits(self, tree: Tree, prompt: Sequence[int], node_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Next-token logits after every node of a tree behind a prompt; for checks.  # [N] -> [N, vocab_size]

        Args:
            tree: at most the engine's nodes.
            prompt: token ids before the root.
            node_ids: token of every node, the root first.
        """
        self.prefill(prompt)
        step = self.prepare(tree)
        step.verify(np.asarray(node_ids, dtype=np.int64))
        return step.block.host_logits()

    def score(self, input_ids: Sequence[int], *, chunk: int, start: int = 0) -> Iterator[npt.NDArray[np.float32]]:
        """Next-token logits of a given text, ``chunk`` tokens a run, causally; see OnnxRuntimeEngine.score.

        Args:
            input_ids: the text.
            chunk: tokens a run, at most the engine's nodes.
            start: the first tokens go in as one block without logits.
        """
        self.rewind(0)
        if start:
            self.prefill(input_ids[:start])
        chunk = min(chunk, self.max_nodes)
        for at in range(start, len(input_ids), chunk):
            ids = np.asarray(input_ids[at : at + chunk], dtype=np.int64)
            block = self._blocks.get(len(ids))
            if block is None:
                block = self._blocks[len(ids)] = Block(self, CAUSAL, len(ids), range(len(ids)), STEP)
            block.run(ids)
            self._set_length(self.length + len(ids))
            yield block.host_logits()

    def _set_length(self, length: int) -> None:
        self.length = length
        self.past.fill_(length)

    @contextmanager
    def at(self, row: int) -> Iterator[None]:
        """Runs in here are none of a sequence: they begin at ``row``, and length and hidden state are afterwards what they were."""
        hidden = self.hidden.clone()
        self.past.fill_(row)
        yield
        self.hidden.copy_(hidden)
        self.past.fill_(self.length)

    def _require(self, tree: Tree) -> None:
        if tree.num_nodes > self.max_nodes:
            limit = f"at most {self.max_nodes} in this engine"
            raise ConfigError("tree", f"{tree.num_nodes} nodes, the root included", limit, "export with --tree")


class Block:
    """The buffers of one kind of run over ``size`` new tokens, bound once: the nodes of a tree, or a causal block."""

    def __init__(self, engine: TensorRtEngine, tree: Tree, size: int, output_rows: Sequence[int], profile: int) -> None:
        import torch

        self.engine, info, place = engine, engine.info, engine.device.place
        is_tree = size == tree.num_nodes
        mask = torch.from_numpy(tree.mask) if is_tree else torch.ones(size, size, dtype=torch.bool).tril()
        depths = torch.from_numpy(tree.depths) if is_tree else torch.arange(size)
        rows = torch.tensor(list(output_rows), dtype=torch.int64, device=place)
        self._ids = engine.device.staged(size)
        self._size = size
        self.total = torch.zeros(1, dtype=torch.int64, device=place)
        self.input_ids = torch.zeros((1, size), dtype=torch.int64, device=place)
        self.next_ids = torch.zeros(len(rows), dtype=torch.int64, device=place)
        self.hidden = torch.zeros((len(rows), info.hidden_size), dtype=engine.hidden.dtype, device=place)
        self.logits = torch.zeros((len(rows), info.vocab_size), dtype=torch.float32, device=place)
        buffers = {
            "input_ids": self.input_ids, "position_offsets": depths[None].to(place), "past_length": engine.past,
            "total_length": self.total, "tree_mask": mask[None, None].to(place), "output_rows": rows,
            "next_ids": self.next_ids, "hidden_states": self.hidden, "logits": self.logits,
        }  # fmt: skip
        names = [f"{layer}.{kind}" for layer in range(info.num_hidden_layers) for kind in ("key", "value")]
        for name, rows_of_one in zip(names, engine.kv, strict=True):
            buffers[f"past_key_values.{name}"] = buffers[f"present.{name}"] = rows_of_one[None]
        self._buffers = buffers  # an engine keeps addresses only
        row = min(engine.length, info.max_length - size)
        self.total.fill_(row + size)
        with engine.at(row):  # it may run while it is bound, on rows that nothing reads
            self._run = engine.decoder.bind(buffers, profile, fixed=profile == STEP)

    def run(self, node_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Run the decoder after the rows now in the cache.  # [size] -> [len(output_rows)]"""
        start = time.perf_counter()
        self._ids.numpy()[:] = node_ids
        self.input_ids[0].copy_(self._ids, non_blocking=True)
        self.total.copy_(self.engine.past).add_(self._size)
        self._run()
        next_ids: npt.NDArray[np.int64] = self.next_ids.cpu().numpy()  # waits for the device
        self.engine.backend_seconds += time.perf_counter() - start
        return next_ids

    def host_logits(self) -> npt.NDArray[np.float32]:
        """Of the last run.  # [len(output_rows), vocab_size]"""
        logits: npt.NDArray[np.float32] = self.logits.cpu().numpy().copy()
        return logits


class TensorRtStep:
    """One tree on an engine. The accepted rows are moved on the device, always as many as the longest path has."""

    def __init__(self, engine: TensorRtEngine, tree: Tree) -> None:
        import torch

        self.tree = tree  # kept alive: the engine finds this step by the tree's identity
        self._engine, self._longest = engine, tree.depth + 1
        self.block = Block(engine, tree, tree.num_nodes, range(tree.num_nodes), STEP)
        place = engine.device.place
        self._staged = engine.device.staged(self._longest + 2)
        self._plan = torch.zeros(
            self._longest + 2, dtype=torch.int64, device=place
        )  # the path, its last node, its length
        self._offsets = torch.arange(self._longest, device=place)
        self._plan[: self._longest] = self._offsets
        with engine.at(0):  # captured while it moves rows onto themselves
            self._move = engine.device.capture(self._keep)

    def verify(self, node_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return self.block.run(node_ids)

    def verify_logits(self, node_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        self.block.run(node_ids)
        return self.block.host_logits()[:, : self._engine.info.sampled]

    def commit(self, path: npt.NDArray[np.int64]) -> None:
        start, plan, count = time.perf_counter(), self._staged.numpy(), len(path)
        plan[: self._longest] = path[-1]  # rows behind the path are not read before they are written again
        plan[:count] = path
        plan[self._longest :] = path[-1], count
        self._plan.copy_(self._staged, non_blocking=True)
        self._move()
        self._engine.length += count
        self._engine.backend_seconds += time.perf_counter() - start

    def _keep(self) -> None:
        engine, path = self._engine, self._plan[: self._longest]
        rows = engine.kv.index_select(2, engine.past + path)  # [2 * layers, kv_heads, depth + 1, head_dim]
        engine.kv.index_copy_(2, engine.past + self._offsets, rows)
        engine.hidden.copy_(self.block.hidden.index_select(0, self._plan[self._longest : -1]))
        engine.past.add_(self._plan[-1:])
