"""ONNX Runtime on the CPU: the embedded default engine.

One KV allocation for all layers, shared by past and present through IOBinding: GroupQueryAttention writes new rows in place, and
accepting a path moves a few rows. Nothing of the size of the cache is ever copied.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from medusa_export.core.errors import ConfigError, missing_package
from medusa_export.core.regular_files import found_instead
from medusa_export.engines.onnxruntime.lazy_memory import lazy_zeros
from medusa_export.heads.contract.engine_info import DECODER_FILE, EngineInfo, heads_file
from medusa_export.heads.trees.tree import MAX_CHOICES, Tree

MASKED = np.float32(-1e30)
# Where numbers must not depend on the number of rows: attention sums one row alone in another order than several.
MIN_ROWS = 2
Array = npt.NDArray[Any]


class OnnxRuntimeEngine:
    """Batch 1. See :class:`medusa_export.engines.decoding.protocols.StepEngine` for the methods.

    Args:
        engine_dir: directory with engine.json, decoder.onnx and heads-{depth}.onnx.
        threads: intra-op threads, shared by both graphs; 0 takes one a core.
    """

    max_nodes = MAX_CHOICES + 1

    def __init__(self, engine_dir: Path, *, threads: int = 0) -> None:
        self._ort = import_onnxruntime()
        self.info = EngineInfo.load(engine_dir)
        share_threads(self._ort, threads)
        self._decoder = self._session(engine_dir / DECODER_FILE, self.info.session_options)
        self._dir = engine_dir
        info = self.info
        shape = (info.num_hidden_layers, 2, 1, info.num_key_value_heads, info.max_length, info.head_dim)
        self._kv = lazy_zeros(shape)
        self.rows = self._kv.reshape(
            -1, info.max_length, info.head_dim
        )  # [layers * 2 * kv_heads, max_length, head_dim]
        self._kv_values = [share(self._kv[layer, kind]) for layer in range(shape[0]) for kind in (0, 1)]
        self._hidden = np.zeros((1, info.hidden_size), dtype=np.float32)  # the last kept row, what the heads read
        self._heads: dict[int, _Heads] = {}
        self._min_rows = MIN_ROWS if info.exact_products else 1
        self._steps: dict[int, tuple[Tree, OnnxRuntimeStep]] = {}  # by id, which holds as long as the tree is kept
        self.length, self.backend_seconds = 0, 0.0

    def prefill(self, input_ids: Sequence[int]) -> int:
        return int(self._prefill(input_ids).next_ids[0])

    def prefill_logits(self, input_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        return self._prefill(input_ids, logits=True).logits[0, : self.info.sampled]

    def _prefill(self, input_ids: Sequence[int], *, logits: bool = False) -> _Block:
        self.length = 0
        block = _Block(self, Tree(()), len(input_ids), output_rows=[len(input_ids) - 1], logits=logits)
        block.run(np.asarray(input_ids, dtype=np.int64))
        self.length = len(input_ids)
        self._hidden[:] = block.hidden
        return block

    def prepare(self, tree: Tree) -> OnnxRuntimeStep:
        if id(tree) not in self._steps:
            self._steps[id(tree)] = tree, OnnxRuntimeStep(self, tree)
        return self._steps[id(tree)][1]

    def draft(self, depth: int) -> npt.NDArray[np.int64]:
        self.open_heads(depth)
        heads = self._heads[depth]
        self._run(heads.session, heads.binding)
        return heads.draft_ids[0]

    def open_heads(self, depth: int) -> None:
        if depth not in self._heads:
            self._heads[depth] = _Heads(self, depth)

    def rewind(self, length: int) -> None:
        self.length = min(length, self.length)

    def tree_logits(self, tree: Tree, prompt: Sequence[int], node_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """As :meth:`~medusa_export.engines.decoding.protocols.ScoringEngine.tree_logits`.  # [N] -> [N, vocab_size]"""
        self.prefill(prompt)
        block = _Block(self, tree, tree.num_nodes, output_rows=range(tree.num_nodes), logits=True)
        block.run(np.asarray(node_ids, dtype=np.int64))
        return block.logits

    def score(self, input_ids: Sequence[int], *, chunk: int, start: int = 0) -> Iterator[npt.NDArray[np.float32]]:
        """Next-token logits of a given text, ``chunk`` tokens a run, causally; the KV cache is refilled.

        Args:
            input_ids: the text.
            chunk: tokens a run. Different chunks give the same numbers up to the order of floating-point sums.
            start: the first tokens go in as one block without logits.

        Yields:
            logits of consecutive tokens.  # [<= chunk, vocab_size]
        """
        self.length = 0
        if start:
            self.prefill(input_ids[:start])
        for at in range(start, len(input_ids), chunk):
            ids = np.asarray(input_ids[at : at + chunk], dtype=np.int64)
            block = _Block(self, Tree(()), len(ids), output_rows=range(len(ids)), logits=True)
            block.run(ids)
            self.length += len(ids)
            yield block.logits

    def _session(self, path: Path, entries: dict[str, str]) -> Any:
        return open_graph(self._ort, path, self._options(entries))

    def _options(self, entries: dict[str, str]) -> Any:
        """Session options; a profiler may add to them."""
        return session_options(self._ort, entries)

    def _run(self, session: Any, binding: Any) -> None:
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        self.backend_seconds += time.perf_counter() - start


class _Heads:
    """The graph of the first ``depth`` heads, bound to the engine's last kept row."""

    def __init__(self, engine: OnnxRuntimeEngine, depth: int) -> None:
        self.session = engine._session(engine._dir / heads_file(depth), engine.info.heads_session_options)
        self.draft_ids = np.zeros((1, depth, engine.info.top_k), dtype=np.int64)
        self.binding = self.session.io_binding()
        self.binding.bind_ortvalue_input("hidden_states", share(engine._hidden))
        self.binding.bind_ortvalue_output("draft_ids", share(self.draft_ids))


class _Block:
    """The buffers and bindings of one run over ``size`` new tokens: the nodes of a tree, or a causal block."""

    def __init__(
        self, engine: OnnxRuntimeEngine, tree: Tree, size: int, *, output_rows: Sequence[int], logits: bool = False
    ) -> None:
        self.engine, self.size = engine, size
        info, rows = engine.info, np.asarray(output_rows, dtype=np.int64)
        self._rows = max(size, engine._min_rows)  # with padding, whose outputs nothing reads
        is_tree = size == tree.num_nodes
        self._is_tree = is_tree and size > 1  # otherwise nothing is masked: GQA itself is causal
        self._tail = np.where(tree.mask, np.float32(0), MASKED)
        self._depths = tree.depths if self._is_tree else np.arange(self._rows)
        self._bias = np.zeros(self._rows * info.max_length, dtype=np.float32)
        self._bias_address = self._bias.ctypes.data
        self.input_ids = np.zeros((1, self._rows), dtype=np.int64)
        self.position_ids = np.zeros((1, self._rows), dtype=np.int64)
        self._seqlens_k, self._total = np.zeros(1, dtype=np.int32), np.zeros((), dtype=np.int32)
        self.next_ids = np.zeros(len(rows), dtype=np.int64)
        self.hidden = np.zeros((len(rows), info.hidden_size), dtype=np.float32)
        self.logits = np.zeros((len(rows), info.vocab_size) if logits else (0, 0), dtype=np.float32)
        self._inputs: dict[str, Array] = {
            "output_rows": rows, "seqlens_k": self._seqlens_k, "total_sequence_length": self._total,
        }  # fmt: skip
        outputs: dict[str, Array] = {"next_ids": self.next_ids, "hidden_states": self.hidden}
        self._outputs = outputs | ({"logits": self.logits} if logits else {})
        self._bindings = {self._rows: self._bind(self._rows)}

    def _bind(self, rows: int) -> Any:
        """A binding for this many rows.  # 1 .. self._rows"""
        engine, outputs = self.engine, self._outputs
        per_row = {"input_ids": self.input_ids[:, :rows], "position_ids": self.position_ids[:, :rows]}
        inputs = self._inputs | per_row
        binding = engine._decoder.io_binding()
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, share(array))
        for name, array in outputs.items():
            binding.bind_ortvalue_output(name, share(array))
        names = [f"{layer}.{kind}" for layer in range(engine.info.num_hidden_layers) for kind in ("key", "value")]
        for name, value in zip(names, engine._kv_values, strict=True):
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        return binding

    def run(self, node_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Run the decoder after the rows now in the cache.  # [size] -> [len(output_rows)]"""
        past, size = self.engine.length, self.size
        has_room = past + self._rows <= self.engine.info.max_length  # for the padding too
        rows = self._rows if has_room else size
        total = past + rows
        self.input_ids[0, :size] = node_ids
        np.add(self._depths, past, out=self.position_ids[0])
        self._seqlens_k[0], self._total[()] = total - 1, total
        if self._is_tree:
            bias = self._bias[: size * total].reshape(size, total)
            bias[:, :past] = 0
            bias[:, past:] = self._tail
        if rows not in self._bindings:
            self._bindings[rows] = self._bind(rows)
        binding = self._bindings[rows]
        binding.bind_input("attention_bias", "cpu", 0, np.float32, (1, 1, rows, total), self._bias_address)
        self.engine._run(self.engine._decoder, binding)
        return self.next_ids


class OnnxRuntimeStep:
    """One tree's buffers; see :class:`medusa_export.engines.decoding.protocols.Step`."""

    def __init__(self, engine: OnnxRuntimeEngine, tree: Tree) -> None:
        self.tree = tree  # kept alive: the engine finds this step by the tree's identity
        self._engine = engine
        self._blocks: dict[bool, _Block] = {}  # with logits, and without
        self._block = self._bound(logits=False)

    def verify(self, node_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        self._block = self._bound(logits=False)
        return self._block.run(node_ids)

    def verify_logits(self, node_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        self._block = self._bound(logits=True)
        self._block.run(node_ids)
        return self._block.logits[:, : self._engine.info.sampled]

    def _bound(self, *, logits: bool) -> _Block:
        if logits not in self._blocks:
            rows = range(self.tree.num_nodes)
            self._blocks[logits] = _Block(self._engine, self.tree, self.tree.num_nodes, output_rows=rows, logits=logits)
        return self._blocks[logits]

    def commit(self, path: npt.NDArray[np.int64]) -> None:
        engine, count = self._engine, len(path)
        if path[-1] != count - 1:  # otherwise the rows already lie where they belong
            past = engine.length
            engine.rows[:, past : past + count] = engine.rows[:, past + path]
        engine.length += count
        engine._hidden[0] = self._block.hidden[path[-1]]


def open_decoder(engine_dir: Path, info: EngineInfo, threads: int = 0, *, name: str = DECODER_FILE) -> Any:
    """The session of an engine's decoder, on the process's thread pool.

    Args:
        engine_dir: of the export.
        info: engine.json, for the session's options.
        threads: of the pool; 0: one a core.
        name: file of the graph.
    """
    ort = import_onnxruntime()
    share_threads(ort, threads)
    return open_graph(ort, engine_dir / name, session_options(ort, info.session_options))


def open_heads(engine_dir: Path, info: EngineInfo, depth: int) -> Any:
    """The session of an engine's first heads, on the same pool.

    Args:
        engine_dir: of the export.
        info: engine.json, for the session's options.
        depth: heads that the graph runs.
    """
    ort = import_onnxruntime()
    return open_graph(ort, engine_dir / heads_file(depth), session_options(ort, info.heads_session_options))


def session_options(ort: ModuleType, entries: dict[str, str]) -> Any:
    """Options of a session on the shared pool."""
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    return options


def open_graph(ort: ModuleType, path: Path, options: Any) -> Any:
    """A session; ConfigError when there is no graph, or ONNX Runtime refuses it.

    Args:
        ort: the module ``onnxruntime``.
        path: of the graph.
        options: of the session.
    """
    instead = found_instead(path)
    if instead is not None:
        raise ConfigError(str(path), instead, "a graph of this version's engines", "export again")
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own classes, all derived from Exception
        raise ConfigError(str(path), f"{error}", "a graph that ONNX Runtime opens", "export again") from error


def share(array: Array) -> Any:
    """An OrtValue on the array's own memory."""
    return import_onnxruntime().OrtValue.ortvalue_from_numpy(array)


def import_onnxruntime() -> ModuleType:
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_package("onnxruntime", "onnx") from error
    return onnxruntime


_pool_threads: int | None = None


def share_threads(ort: ModuleType, threads: int) -> None:
    """One pool for both graphs: two pools would spin against each other on the same cores."""
    global _pool_threads
    if _pool_threads is None:
        ort.set_global_thread_pool_sizes(threads, 1)
        _pool_threads = threads
    elif _pool_threads != threads:
        raise ConfigError("threads", str(threads), f"{_pool_threads}, this process's pool", "use one value a process")
