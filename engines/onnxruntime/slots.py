"""Many conversations at once on ONNX Runtime: autoregressive decoding in which every sequence has a slot of the KV cache.

A step reads every weight once, whatever the number of sequences, so a CPU generates many times what it does for one. A slot that
becomes free is filled at once (continuous batching); the sequences in use are kept in the first slots, so that a step runs on as many
rows as there are sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medusa_export.core.errors import ConfigError
from medusa_export.engines.onnxruntime.engine import open_decoder, share
from medusa_export.engines.onnxruntime.lazy_memory import lazy_zeros
from medusa_export.heads.contract.engine_info import EngineInfo

Array = npt.NDArray[Any]


class Slots:
    """Sequences in slots ``0 .. active - 1``, each with its own length.

    Args:
        engine_dir: directory with engine.json.
        slots: sequences at once, at most.
        max_length: tokens of a sequence. None: the engine's.

    Raises:
        ConfigError: no slot at all.
    """

    def __init__(self, engine_dir: Path, slots: int, max_length: int | None) -> None:
        self.info = EngineInfo.load(engine_dir)
        self.max_length = min(max_length or self.info.max_length, self.info.max_length)
        if slots < 1:
            raise ConfigError("slots", f"{slots}", "at least one sequence at once", "raise it")
        self.slots, self.active = slots, 0
        self._lengths = np.zeros(slots, dtype=np.int64)

    def remaining(self, slot: int) -> int:
        """Tokens that still fit."""
        return self.max_length - int(self._lengths[slot])

    def _take(self, input_ids: Sequence[int]) -> int:
        """The next free slot, for a prompt."""
        self._require_room(input_ids)
        slot = self.active
        self.active += 1
        self._lengths[slot] = 0
        return slot

    def _require_room(self, input_ids: Sequence[int]) -> None:
        if self.active == self.slots:
            raise ConfigError("slots", f"{self.slots} in use", "a free one", "let a sequence end first")
        if not 0 < len(input_ids) < self.max_length:
            got, limit = f"{len(input_ids)} tokens", f"1 .. {self.max_length - 1}"
            raise ConfigError("prompt", got, limit, "shorten it, or allow longer sequences")


class BatchDecoder(Slots):
    """Autoregressive decoding of several sequences.

    Args:
        engine_dir: directory with engine.json and decoder.onnx.
        slots: sequences at once, at most.
        max_length: tokens of a sequence; the KV cache has slots * max_length rows. None: the engine's.
        threads: intra-op threads; 0 takes one a core.
    """

    def __init__(self, engine_dir: Path, *, slots: int, max_length: int | None = None, threads: int = 0) -> None:
        super().__init__(engine_dir, slots, max_length)
        self._session = open_decoder(engine_dir, self.info, threads)
        info = self.info
        shape = (2 * info.num_hidden_layers, slots, info.num_key_value_heads, info.max_length, info.head_dim)
        self._kv = lazy_zeros(shape)

    def admit(self, input_ids: Sequence[int]) -> Array:
        """Run a prompt in the next free slot.  # [S] -> logits [vocab_size]

        Raises:
            ConfigError: a prompt that leaves no room, or no free slot.
        """
        slot = self._take(input_ids)
        return self._run(np.asarray([input_ids], dtype=np.int64), slice(slot, slot + 1))[0]

    def step(self, tokens: Sequence[int]) -> Array:
        """The next token of every active sequence goes in.  # [active] -> logits [active, vocab_size]"""
        return self._run(np.asarray(tokens, dtype=np.int64)[:, None], slice(0, self.active))

    def release(self, slot: int) -> None:
        """End a sequence; the last active one moves into its slot."""
        self.active -= 1
        if slot != self.active:
            length = self._lengths[slot] = self._lengths[self.active]
            self._kv[:, slot, :, :length] = self._kv[:, self.active, :, :length]

    def _run(self, input_ids: Array, slots: slice) -> Array:
        """New tokens behind what the slots hold; the last position's logits.  # [B, S] -> [B, vocab_size]"""
        batch, size = input_ids.shape
        lengths = self._lengths[slots]
        total = int(lengths.max()) + size
        inputs = {
            "input_ids": input_ids,
            "position_ids": (lengths[:, None] + np.arange(size)).astype(np.int64),
            "attention_bias": np.zeros(
                (1, 1, size, total), dtype=np.float32
            ),  # the operator is causal, and knows the lengths
            "seqlens_k": (lengths + size - 1).astype(np.int32),
            "total_sequence_length": np.array(total, dtype=np.int32),
            "output_rows": np.arange(batch, dtype=np.int64) * size + size - 1,
        }
        logits = np.empty((batch, self.info.vocab_size), dtype=np.float32)
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, share(np.ascontiguousarray(array)))
        binding.bind_ortvalue_output("logits", share(logits))
        for index, cache in enumerate(self._kv):
            name = f"{index // 2}.{('key', 'value')[index % 2]}"
            value = share(cache[slots])
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        self._session.run_with_iobinding(binding)
        self._lengths[slots] += size
        return logits[:, : self.info.sampled]
