"""Sequences that share a run of the batch decoder: their keys and values, and the buffers of runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from medusa_export.engines.onnxruntime.engine import MASKED, share
from medusa_export.engines.onnxruntime.lazy_memory import lazy_zeros
from medusa_export.heads.contract.engine_info import EngineInfo

Array = npt.NDArray[Any]


class Lane:
    """Keys and values of some sequences at places ``0 .. len(slots) - 1``, ``capacity`` rows each.

    Args:
        info: of the engine.
        session: the batch decoder.
        places: sequences, at most. Memory exists once it is written.
        capacity: rows of every sequence.
        slots: whose sequences lie at the first places.
    """

    def __init__(
        self, info: EngineInfo, session: Any, *, places: int, capacity: int, slots: Sequence[int] = ()
    ) -> None:
        self.info, self.session, self.capacity, self.slots = info, session, capacity, list(slots)
        shape = (2 * info.num_hidden_layers, places, info.num_key_value_heads, capacity, info.head_dim)
        self.kv = lazy_zeros(shape)
        self._runs: dict[tuple[int, int], Run] = {}  # by sequences and new tokens
        self._logits = np.empty((0, info.vocab_size), dtype=np.float32)

    def run(self, size: int) -> Run:
        """A run of ``size`` new tokens of each sequence; the same buffers every time."""
        key = (len(self.slots), size)
        if key not in self._runs:
            self._runs[key] = Run(self, size)
        return self._runs[key]

    def logits(self, rows: int) -> Array:
        """Memory for ``rows`` rows of logits, the same for all runs: one at a time needs it.  # [rows, vocab_size]"""
        if rows > len(self._logits):
            self._logits = np.empty((rows, self.info.vocab_size), dtype=np.float32)
            self._runs.clear()  # they are bound to the old memory
        return self._logits[:rows]

    def kept(self, place: int, length: int) -> Array:
        """The first rows of a sequence.  # [2 * layers, kv_heads, length, head_dim]"""
        return self.kv[:, place, :, :length]

    def keep(self, place: int, length: int, rows: Array) -> None:
        """Write rows behind the first ``length``.

        Args:
            place: of the sequence.
            length: rows before.
            rows: [2 * layers, kv_heads, rows, head_dim].
        """
        self.kv[:, place, :, length : length + rows.shape[2]] = rows

    def add(self, slot: int, rows: Array) -> None:
        """Take a sequence in.  # rows: [2 * layers, kv_heads, length, head_dim]"""
        self.keep(len(self.slots), 0, rows)
        self.slots.append(slot)

    def remove(self, slot: int, length: Callable[[int], int]) -> None:
        """Let a sequence go; the one at the last place moves into its place.

        Args:
            slot: whose sequence ends.
            length: rows of a slot's sequence.
        """
        place, moved = self.slots.index(slot), self.slots.pop()
        if moved != slot:
            self.keep(place, 0, self.kept(len(self.slots), length(moved)))
            self.slots[place] = moved

    def rename(self, old: int, new: int) -> None:
        """The sequence of a slot has another now."""
        self.slots = [new if slot == old else slot for slot in self.slots]


class Run:
    """The buffers and bindings of runs over ``size`` new tokens of every sequence of a lane.

    Attributes:
        next_ids: the greedy next token after every node.  # [sequences, size]
        logits: of every output row.  # [sequences * size, vocab_size], or the last alone
        hidden: after the final norm, of the same rows.
        rows: new keys and values.  # [2 * layers, sequences, kv_heads, size, head_dim]
    """

    def __init__(self, lane: Lane, size: int, *, last_only: bool = False) -> None:
        info, batch, capacity = lane.info, len(lane.slots), lane.capacity
        self.lane, self.size = lane, size
        rows = np.arange(size - 1 if last_only else 0, batch * size, dtype=np.int64)
        self._input_ids, self._position_ids = np.zeros((2, batch, size), dtype=np.int64)
        self._bias = np.zeros((batch, 1, size, capacity + size), dtype=np.float32)
        self._past = np.arange(capacity)
        self.hidden = np.zeros((len(rows), info.hidden_size), dtype=np.float32)
        self.rows = np.zeros((len(lane.kv), batch, info.num_key_value_heads, size, info.head_dim), dtype=np.float32)
        next_ids = np.zeros(len(rows), dtype=np.int64)
        self.next_ids = next_ids if last_only else next_ids.reshape(batch, size)
        self.logits = lane.logits(len(rows))
        self._binding = lane.session.io_binding()
        inputs: dict[str, Array] = {
            "input_ids": self._input_ids,
            "position_ids": self._position_ids,
            "attention_bias": self._bias,
        }
        for name, array in (inputs | {"output_rows": rows}).items():
            self._binding.bind_ortvalue_input(name, share(array))
        outputs: dict[str, Array] = {"hidden_states": self.hidden, "next_ids": next_ids, "logits": self.logits}
        for name, array in outputs.items():
            self._binding.bind_ortvalue_output(name, share(array))
        for index, (cache, new) in enumerate(zip(lane.kv, self.rows, strict=True)):
            name = f"{index // 2}.{('key', 'value')[index % 2]}"
            self._binding.bind_ortvalue_input(f"past_key_values.{name}", share(cache[:batch]))
            self._binding.bind_ortvalue_output(f"present.{name}", share(new))

    def execute(self, node_ids: Array, lengths: Array, depths: Array, mask: Array) -> None:
        """Run the decoder.

        Args:
            node_ids: [sequences, size].
            lengths: kept rows of every sequence.  # [sequences]
            depths: positions behind each sequence's rows.  # [size]
            mask: which of the new tokens each of them sees.  # [size, size]
        """
        self._input_ids[:] = node_ids
        self._position_ids[:] = lengths[:, None] + depths
        capacity = len(self._past)
        past = np.where(self._past < lengths[:, None], np.float32(0), MASKED)  # [sequences, capacity]
        self._bias[..., :capacity] = past[:, None, None]
        self._bias[..., capacity:] = np.where(mask, np.float32(0), MASKED)
        self.lane.session.run_with_iobinding(self._binding)
