"""Trees of many sequences in one step on ONNX Runtime: every sequence has a slot, its own length and its own accepted path.

A step reads every weight once for all sequences, or once a lane where long ones run apart (:mod:`.lane_plan`). The cache holds kept
rows only; a step's new rows come out apart, and those of the accepted paths are copied behind the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medusa_export.engines.decoding.step import PREFILL, ROOT
from medusa_export.engines.onnxruntime.engine import open_decoder, open_heads
from medusa_export.engines.onnxruntime.lane import Lane, Run
from medusa_export.engines.onnxruntime.lane_plan import Plan, Traffic, capacity, plan_lanes
from medusa_export.engines.onnxruntime.slots import Slots
from medusa_export.heads.contract.engine_info import BATCH_DECODER_FILE, DECODER_FILE, EngineInfo
from medusa_export.heads.trees.tree import MAX_CHOICES, Tree

Array = npt.NDArray[Any]

PATIENCE = 8  # steps that read too much before the cache is laid out anew, which costs about as much as one
TOO_MUCH = 1.25  # times what the best lanes would read


class TreeBatchDecoder(Slots):
    """Decoding of several sequences, each step with any tree; the empty one is autoregressive decoding.

    Args:
        engine_dir: directory with engine.json, decoder-batch.onnx and heads-{depth}.onnx.
        slots: sequences at once, at most.
        max_length: tokens of a sequence. None: the engine's.
        threads: intra-op threads; 0 takes one a core.
        traffic: what runs read, by which long sequences run apart from short ones. None: by the engine's size.
    """

    max_nodes = MAX_CHOICES + 1

    def __init__(
        self,
        engine_dir: Path,
        *,
        slots: int,
        max_length: int | None = None,
        threads: int = 0,
        traffic: Traffic | None = None,
    ) -> None:
        super().__init__(engine_dir, slots, max_length)
        self._dir = engine_dir
        self._session = open_decoder(engine_dir, self.info, threads, name=BATCH_DECODER_FILE)
        self._heads: dict[int, Any] = {}
        self._hidden = np.zeros((slots, self.info.hidden_size), dtype=np.float32)  # of each sequence's last kept row
        self._traffic = traffic or _traffic(engine_dir, self.info)
        self._lanes: list[Lane] = []
        self._wasteful = 0  # steps in a row that read too much
        self._runs: list[Run] = []  # of the last verified step
        self._rest = list[int]()  # what is left of a prompt that is being filled in
        self._prompt, self._filled = self._prompt_lane(1), 0  # where it is, and its rows

    @property
    def capacities(self) -> list[int]:
        """Rows of the cache that a step reads for every sequence, a lane each."""
        return [lane.capacity for lane in self._lanes]

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
        self._rest, self._filled = list(input_ids), 0
        if self._prompt.capacity != capacity(len(input_ids)):
            self._prompt = self._prompt_lane(len(input_ids))

    def prefill_chunk(self, count: int) -> Array | None:
        """Run the next tokens of the prompt, ``count`` at most.

        Returns:
            Logits [vocab_size] behind the last prompt token: the sequence is the last active one from now on.
        """
        ids = np.asarray(self._rest[: min(count, PREFILL)], dtype=np.int64)[None]
        size = ids.shape[1]
        run = Run(self._prompt, size, last_only=True)
        run.execute(ids, np.array([self._filled]), np.arange(size), np.tri(size, dtype=bool))
        self._prompt.keep(0, self._filled, run.rows[:, 0])
        self._filled += size
        self._rest = self._rest[size:]
        if self._rest:
            return None
        self._join(run.hidden[0])
        return run.logits[0, : self.info.sampled].copy()

    def _join(self, hidden: Array) -> None:
        """Make the filled prompt the last active sequence."""
        slot, rows = self.active, self._prompt.kept(0, self._filled)
        room = [lane for lane in self._lanes if lane.capacity > self._filled]
        if room:
            min(room, key=lambda lane: lane.capacity).add(slot, rows)
        else:
            needed = np.array([*self._lengths[:slot], self._filled]) + 1
            self._arrange(plan_lanes(needed.tolist(), self._traffic), {slot: rows})
        self._lengths[slot], self._hidden[slot] = self._filled, hidden
        self.active += 1

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
        self._verify(tree, node_ids)
        return self._by_slot([run.next_ids for run in self._runs])

    def verify_logits(self, tree: Tree, node_ids: npt.NDArray[np.int64]) -> Array:
        """As :meth:`verify`, but all logits.  # [active, N] -> [active, N, vocab_size]"""
        self._verify(tree, node_ids)
        shape = (-1, tree.num_nodes, self.info.vocab_size)
        return self._by_slot([run.logits.reshape(shape) for run in self._runs])[..., : self.info.sampled]

    def _verify(self, tree: Tree, node_ids: npt.NDArray[np.int64]) -> None:
        self._runs = [lane.run(tree.num_nodes) for lane in self._lanes]
        for run in self._runs:
            slots = run.lane.slots
            run.execute(node_ids[slots], self._lengths[slots], tree.depths, tree.mask)

    def _by_slot(self, parts: list[Array]) -> Array:
        """What the runs gave, in the order of the slots."""
        slots = [slot for run in self._runs for slot in run.lane.slots]
        if len(parts) == 1 and slots == sorted(slots):
            return parts[0]
        found = np.empty((len(slots), *parts[0].shape[1:]), dtype=parts[0].dtype)
        found[slots] = np.concatenate(parts)
        return found

    def commit(self, paths: Sequence[npt.NDArray[np.int64]]) -> None:
        """Make every active sequence's accepted nodes the newest rows of its cache, and drop the others.

        Args:
            paths: node indices of the verified tree, the root first, a path a sequence.
        """
        assert self._runs, "verify comes first"
        rows = dict[int, Array]()
        for run in self._runs:
            for place, slot in enumerate(run.lane.slots):
                self._hidden[slot] = run.hidden[place * run.size + paths[slot][-1]]
                rows[slot] = run.rows[:, place][:, :, paths[slot]]
        self._fit(self._lengths[: self.active] + [len(path) for path in paths])
        for lane in self._lanes:
            for place, slot in enumerate(lane.slots):
                lane.keep(place, int(self._lengths[slot]), rows[slot])
        self._lengths[: self.active] += [len(path) for path in paths]

    def rewind(self, length: int) -> None:
        """Drop the rows of every active sequence from ``length`` on; what the heads read stays."""
        self._lengths[: self.active] = np.minimum(self._lengths[: self.active], length)

    def release(self, slot: int) -> None:
        """End a sequence; the last active one moves into its slot."""
        self.active -= 1
        last, lengths = self.active, self._lengths
        lane = next(lane for lane in self._lanes if slot in lane.slots)
        lane.remove(slot, lambda moved: int(lengths[moved]))
        self._lanes = [lane for lane in self._lanes if lane.slots]
        if slot != last:
            for lane in self._lanes:
                lane.rename(last, slot)
            lengths[slot], self._hidden[slot] = lengths[last], self._hidden[last]

    def _fit(self, needed: Array) -> None:
        """Room for every sequence; and no lanes that read much more than they have to, for long."""
        plan = plan_lanes(needed.tolist(), self._traffic)
        reads = sum(self._traffic.cost(len(lane.slots), lane.capacity) for lane in self._lanes)
        self._wasteful = self._wasteful + 1 if reads > TOO_MUCH * plan.cost else 0
        fits = all(needed[lane.slots].max() <= lane.capacity for lane in self._lanes)
        if not fits or self._wasteful >= PATIENCE:
            self._arrange(plan, {})

    def _arrange(self, plan: Plan, new: dict[int, Array]) -> None:
        """Lay the cache out anew.

        Args:
            plan: the lanes, with room for every sequence.
            new: kept rows of sequences that have no lane yet.
        """
        kept = new | {
            slot: lane.kept(place, int(self._lengths[slot]))
            for lane in self._lanes
            for place, slot in enumerate(lane.slots)
        }
        lanes = []
        for slots, rows in zip(plan.slots, plan.capacities, strict=True):
            lane = Lane(self.info, self._session, places=self.slots, capacity=rows)
            for slot in slots:
                lane.add(slot, kept[slot])
            lanes.append(lane)
        self._lanes, self._wasteful = lanes, 0

    def _prompt_lane(self, rows: int) -> Lane:
        """For the one prompt that is being filled in: it reads no others' rows, and they none of its."""
        return Lane(self.info, self._session, places=1, capacity=capacity(rows), slots=[0])


def _traffic(engine_dir: Path, info: EngineInfo) -> Traffic:
    """Of an engine. In memory and in time its weights are about twice their file: 16-bit ones are multiplied as float32, and a run
    has a cost of its own."""
    data = engine_dir / f"{DECODER_FILE}.data"
    row = 2 * info.num_hidden_layers * info.num_key_value_heads * info.head_dim * np.dtype(np.float32).itemsize
    return Traffic(weights=2 * data.stat().st_size, row=row)
