"""An engine of one sequence as a batch of one: for the decode loop, and for a scheduler that serves TensorRT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from medusa_export.core.errors import ConfigError
from medusa_export.engines.decoding.protocols import Step, StepEngine
from medusa_export.heads.trees.tree import Tree

Array = npt.NDArray[Any]


class OneSequence:
    """A :class:`~medusa_export.engines.decoding.protocols.TreeDecoder` with one slot: others wait until the answer is complete."""

    slots = 1

    def __init__(self, engine: StepEngine) -> None:
        self.info, self.max_length, self.active = engine.info, engine.info.max_length, 0
        self.max_nodes = engine.max_nodes
        self._engine = engine
        self._prompt, self._unread = list[int](), 0
        self._step: Step | None = None

    def prepare(self, trees: Sequence[Tree], depths: Sequence[int]) -> None:
        """Bind trees and open heads before the first step needs them."""
        for tree in trees:
            self._engine.prepare(tree)
        for depth in depths:
            self._engine.open_heads(depth)

    def remaining(self, slot: int) -> int:
        """Tokens that still fit."""
        return self.max_length - self._engine.length

    def begin(self, input_ids: Sequence[int]) -> None:
        """Take a prompt.

        Raises:
            ConfigError: a prompt that leaves no room, or another sequence that has not ended.
        """
        if self.active:
            raise ConfigError("slots", "a sequence that has not ended", "a free slot", "let it end first")
        if not 0 < len(input_ids) < self.max_length:
            limit = f"1 .. {self.max_length - 1}"
            raise ConfigError("prompt", f"{len(input_ids)} tokens", limit, "shorten it, or allow longer sequences")
        self._prompt, self._unread = list(input_ids), len(input_ids)

    def prefill_chunk(self, count: int) -> Array | None:
        """Nobody else needs steps in between, so that all of a prompt runs with its last part.  # -> [vocab_size]"""
        self._unread = max(0, self._unread - count)
        if self._unread:
            return None
        logits = self._engine.prefill_logits(self._prompt).copy()
        self.active = 1
        return logits

    def drop(self) -> None:
        """Forget the prompt that is being filled in."""
        self._prompt, self._unread = [], 0

    def draft(self, depth: int) -> npt.NDArray[np.int64]:
        """Candidates of the first heads.  # [1, depth, top_k]"""
        return self._engine.draft(depth)[None]

    def verify(self, tree: Tree, node_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The base model's greedy next token after every node.  # [1, N] -> [1, N]"""
        self._step = self._engine.prepare(tree)
        return self._step.verify(node_ids[0])[None]

    def verify_logits(self, tree: Tree, node_ids: npt.NDArray[np.int64]) -> Array:
        """As :meth:`verify`, but all logits.  # [1, N] -> [1, N, vocab_size]"""
        self._step = self._engine.prepare(tree)
        return self._step.verify_logits(node_ids[0])[None]

    def commit(self, paths: Sequence[npt.NDArray[np.int64]]) -> None:
        """Make the accepted nodes the newest rows of the cache, and drop the others."""
        assert self._step is not None, "verify comes first"
        self._step.commit(paths[0])

    def release(self, slot: int) -> None:
        """End the sequence."""
        self.active = 0
