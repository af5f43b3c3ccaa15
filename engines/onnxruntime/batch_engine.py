"""Trees of many sequences in one step on ONNX Runtime: every sequence has a slot, its own length and its own accepted path.

A step reads every weight once for all sequences. The cache holds kept rows only, ``capacity`` for each slot; a step's new rows come
out apart, and those of the accepted paths are copied behind the others. Slots in use come first, so a step computes no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medusa_export.engines.decoding.step import PREFILL, ROOT
from medusa_export.engines.onnxruntime.engine import MASKED, open_decoder, open_heads, share
from medusa_export.engines.onnxruntime.lazy_memory import lazy_zeros
from medusa_export.engines.onnxruntime.slots import Slots
from medusa_export.heads.contract.engine_info import BATCH_DECODER_FILE, EngineInfo
from medusa_export.heads.trees.tree import MAX_CHOICES, Tree

Array = npt.NDArray[Any]

BLOCK = 128  # rows by which a slot's cache grows
PATIENCE = 8  # runs before it shrinks: moving it costs about as much as a run


class TreeBatchDecoder(Slots):
    """Decoding of several sequences, each step with any tree; the empty one is autoregressive decoding.

    Args:
        engine_dir: directory with engine.json, decoder-batch.onnx and heads-{depth}.onnx.
        slots: sequences at once, at most.
        max_length: tokens of a sequence. None: the engine's.
        threads: intra-op threads; 0 takes one a core.
    """

    max_nodes = MAX_CHOICES + 1

    def __init__(self, engine_dir: Path, *, slots: int, max_length: int | None = None, threads: int = 0) -> None:
        super().__init__(engine_dir, slots, max_length)
        self._dir = engine_dir
        self._session = open_decoder(engine_dir, self.info, threads, name=BATCH_DECODER_FILE)
        self._heads: dict[int, Any] = {}
        self._hidden = np.zeros((slots, self.info.hidden_size), dtype=np.float32)  # of each sequence's last kept row
        self.kv = self._cache(BLOCK)
        self._slack = 0  # runs for which half of the cache would have done
        self._logits = np.empty((0, self.info.vocab_size), dtype=np.float32)
        self._spare, self._rest = slots - 1, list[int]()  # where a prompt is filled in, and what is left of it
        self._blocks: dict[tuple[int, int, int], _Block] = {}  # (first slot, batch, size)
        self._block: _Block | None = None  # the last verified one

    def prepare(self, trees: Sequence[Tree], depths: Sequence[int]) -> None:
        """Open heads. Any tree is ready: buffers depend on how many sequences there are."""
        for depth in depths:
            self._open_heads(depth)

    def admit(self, input_ids: Sequence[int]) -> Array:
        """Run a prompt in the next free slot.  # [S] -> logits [vocab_size]

        Raises:
            ConfigError: a prompt that leaves no room, or no free slot.
        """
        self.begin(input_ids)
        while (logits := self.prefill_chunk(PREFILL)) is None:
            pass
        return logits

    def begin(self, input_ids: Sequence[int]) -> None:
        """Prepare a prompt that :meth:`prefill_chunk` runs in parts, with steps of the active sequences in between. One at a time.

        Raises:
            ConfigError: a prompt that leaves no room, or no free slot.
        """
        self._require_room(input_ids)
        self._rest = list(input_ids)
        self._lengths[self._spare] = 0

    def prefill_chunk(self, count: int) -> Array | None:
        """Run the next tokens of the prompt, ``count`` at most.

        Returns:
            Logits [vocab_size] behind the last prompt token: the sequence is the last active one from now on.
        """
        ids = np.asarray(self._rest[: min(count, PREFILL)], dtype=np.int64)[None]
        size = ids.shape[1]
        block = _Block(self, self._spare, 1, size, last_only=True)
        block.run(ids, np.arange(size), np.tri(size, dtype=bool))
        self.keep_rows(block, [np.arange(size)])
        self._rest = self._rest[size:]
        if self._rest:
            return None
        self._hidden[self._spare] = block.hidden[0]
        self._move(self._spare, self.active)
        self.active += 1
        return block.logits()[0, : self.info.sampled].copy()

    def drop(self) -> None:
        """Forget the prompt that is being filled in."""
        self._rest = []

    def step(self, tokens: Sequence[int]) -> Array:
        """The next token of every active sequence goes in.  # [active] -> logits [active, vocab_size]"""
        logits = self.verify_logits(ROOT, np.asarray(tokens, dtype=np.int64)[:, None])
        self.commit([np.zeros(1, dtype=np.int64)] * self.active)
        return logits[:, 0]

    def draft(self, depth: int) -> npt.NDArray[np.int64]:
        """Candidates of the first heads for the last kept row of every active sequence.  # [active, depth, top_k]"""
        drafts: npt.NDArray[np.int64]
        (drafts,) = self._open_heads(depth).run(["draft_ids"], {"hidden_states": self._hidden[: self.active]})
        return drafts

    def _open_heads(self, depth: int) -> Any:
        if depth not in self._heads:
            self._heads[depth] = open_heads(self._dir, self.info, depth)
        return self._heads[depth]

    def verify(self, tree: Tree, node_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The base model's greedy next token after every node of every active sequence.  # [active, N] -> [active, N]"""
        return self._verify(tree, node_ids).next_ids()

    def verify_logits(self, tree: Tree, node_ids: npt.NDArray[np.int64]) -> Array:
        """As :meth:`verify`, but all logits.  # [active, N] -> [active, N, vocab_size]"""
        return self._verify(tree, node_ids).logits().reshape(*node_ids.shape, -1)[..., : self.info.sampled]

    def commit(self, paths: Sequence[npt.NDArray[np.int64]]) -> None:
        """Make every active sequence's accepted nodes the newest rows of its cache, and drop the others.

        Args:
            paths: node indices of the verified tree, the root first, a path a sequence.
        """
        assert self._block is not None, "verify comes first"
        for slot, path in enumerate(paths):
            self._hidden[slot] = self._block.hidden[slot * self._block.size + path[-1]]
        self.keep_rows(self._block, paths)

    def rewind(self, length: int) -> None:
        """Drop the rows of every active sequence from ``length`` on; what the heads read stays."""
        self._lengths[: self.active] = np.minimum(self._lengths[: self.active], length)

    def release(self, slot: int) -> None:
        """End a sequence; the last active one moves into its slot."""
        self.active -= 1
        self._move(self.active, slot)

    def _move(self, source: int, target: int) -> None:
        if source != target:
            length = self._lengths[target] = self._lengths[source]
            self.kv[:, target, :, :length] = self.kv[:, source, :, :length]
            self._hidden[target] = self._hidden[source]

    def _verify(self, tree: Tree, node_ids: npt.NDArray[np.int64]) -> _Block:
        key = (0, *node_ids.shape)
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = _Block(self, *key)
        self._block = block
        block.run(node_ids, tree.depths, tree.mask)
        return block

    def keep_rows(self, block: _Block, paths: Sequence[npt.NDArray[np.int64]]) -> None:
        slots = range(block.first, block.first + len(paths))
        needed = self._lengths.copy()
        if self._rest:
            needed[self._spare] += len(self._rest)  # all of a prompt at once, so that the cache moves once
        if not (self._rest and block.first == self._spare):
            needed[slots] += [len(path) for path in paths]
        self._fit(int(needed[[*self._used(), *slots]].max()))
        for row, (slot, path) in enumerate(zip(slots, paths, strict=True)):
            length = self._lengths[slot]
            self.kv[:, slot, :, length : length + len(path)] = block.rows[:, row][:, :, path]
            self._lengths[slot] += len(path)

    def _fit(self, rows: int) -> None:
        """Room for sequences of ``rows`` rows, but not for twice as many: a step reads all rows of a slot, masked ones too."""
        capacity, old = -(-rows // BLOCK) * BLOCK, self.kv
        self._slack = self._slack + 1 if capacity <= old.shape[3] // 2 else 0
        if capacity <= old.shape[3] and self._slack < PATIENCE:
            return
        self.kv = self._cache(capacity)
        for slot in self._used():
            length = self._lengths[slot]
            self.kv[:, slot, :, :length] = old[:, slot, :, :length]
        self._blocks.clear()  # they are bound to the old memory

    def _used(self) -> list[int]:
        """Slots that hold something."""
        return [*range(self.active), *([self._spare] if self._rest else [])]

    def _scratch(self, rows: int) -> Array:
        """Memory for ``rows`` rows of logits, the same for all runs: one at a time needs it.  # [rows, vocab_size]"""
        if rows > len(self._logits):
            self._logits = np.empty((rows, self.info.vocab_size), dtype=np.float32)
            self._blocks.clear()
        return self._logits[:rows]

    def _cache(self, capacity: int) -> Array:
        info = self.info
        shape = (2 * info.num_hidden_layers, self.slots, info.num_key_value_heads, capacity, info.head_dim)
        return lazy_zeros(shape)


class _Block:
    """The buffers and bindings of runs over ``size`` new tokens of ``batch`` sequences, from slot ``first`` on."""

    def __init__(
        self, decoder: TreeBatchDecoder, first: int, batch: int, size: int, *, last_only: bool = False
    ) -> None:
        info: EngineInfo = decoder.info
        self.first, self.size, self._decoder = first, size, decoder
        capacity, self._shape = decoder.kv.shape[3], (batch, size)
        rows = np.arange(size - 1 if last_only else 0, batch * size, dtype=np.int64)
        self._input_ids, self._position_ids = np.zeros((2, batch, size), dtype=np.int64)
        self._bias = np.zeros((batch, 1, size, capacity + size), dtype=np.float32)
        self._past = np.arange(capacity)
        self.hidden = np.zeros((len(rows), info.hidden_size), dtype=np.float32)
        self.rows = np.zeros((len(decoder.kv), batch, *decoder.kv.shape[2:3], size, info.head_dim), dtype=np.float32)
        self._binding = decoder._session.io_binding()
        inputs = {"input_ids": self._input_ids, "position_ids": self._position_ids, "attention_bias": self._bias}
        for name, array in (inputs | {"output_rows": rows}).items():
            self._binding.bind_ortvalue_input(name, share(array))
        self._binding.bind_ortvalue_output("hidden_states", share(self.hidden))
        for index, (cache, new) in enumerate(zip(decoder.kv, self.rows, strict=True)):
            name = f"{index // 2}.{('key', 'value')[index % 2]}"
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", share(cache[first : first + batch]))
            self._binding.bind_ortvalue_output(f"present.{name}", share(new))
        self._next_ids = np.zeros(len(rows), dtype=np.int64)
        self._logits = decoder._scratch(len(rows))
        self._binding.bind_ortvalue_output("next_ids", share(self._next_ids))
        self._binding.bind_ortvalue_output("logits", share(self._logits))

    def run(self, node_ids: Array, depths: Array, mask: Array) -> None:
        """Run the decoder.

        Args:
            node_ids: [batch, size].
            depths: positions behind each sequence's rows.  # [size]
            mask: which of the new tokens each of them sees.  # [size, size]
        """
        lengths = self._decoder._lengths[self.first : self.first + len(node_ids)]
        self._input_ids[:] = node_ids
        self._position_ids[:] = lengths[:, None] + depths
        capacity = len(self._past)
        past = np.where(self._past < lengths[:, None], np.float32(0), MASKED)  # [batch, capacity]
        self._bias[..., :capacity] = past[:, None, None]
        self._bias[..., capacity:] = np.where(mask, np.float32(0), MASKED)
        self._decoder._session.run_with_iobinding(self._binding)

    def next_ids(self) -> npt.NDArray[np.int64]:
        """The greedy next token after every node.  # [batch, size]"""
        return self._next_ids.reshape(self._shape)

    def logits(self) -> Array:
        """Of every output row.  # [R, vocab_size]"""
        return self._logits
