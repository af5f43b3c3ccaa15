"""Attention of a step's rows behind a long past, in every way that ONNX Runtime's CPU operators have: which one costs least?

    python benchmarks/attention.py

One sequence, 9 query heads on 3 key/value heads of 64 (SmolLM2-135M), its 30 layers and nothing else. Ways are interleaved; medians.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any

import numpy as np
import onnx
import onnxruntime as ort
import typer
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

from medusa_export.engines.onnxruntime.engine import session_options, share_threads

KV_HEADS, GROUP, HEAD_DIM = 3, 3, 64
HEADS = KV_HEADS * GROUP
MASKED = np.float32(-1e30)
PASTS, ROWS = (256, 1000, 2000), (1, 2, 3, 4, 8)

Array = np.ndarray[Any, Any]


@dataclass
class Sample:
    """Queries, keys and values of one layer, the new rows behind the past.

    Attributes:
        past: rows before.
        q: [S, HEADS, HEAD_DIM], the heads of a group together.
        k, v: [past + S, KV_HEADS, HEAD_DIM].
        bias: 0 or MASKED.  # [S, past + S]
    """

    past: int
    q: Array
    k: Array
    v: Array
    bias: Array

    @property
    def rows(self) -> int:
        return len(self.q)

    @property
    def group_rows(self) -> Array:
        """The heads of a group as rows of one product.  # [KV_HEADS, GROUP * S, HEAD_DIM]"""
        split = self.q.reshape(self.rows, KV_HEADS, GROUP, HEAD_DIM)
        return np.ascontiguousarray(split.transpose(1, 2, 0, 3)).reshape(KV_HEADS, -1, HEAD_DIM)


@dataclass(frozen=True)
class Way:
    """A formulation: nodes that read the inputs and write ``out``, one layer."""

    name: str
    nodes: Sequence[onnx.NodeProto]
    inputs: Callable[[Sample], dict[str, Array]]
    shared: Sequence[str] = ()  # inputs that are written in place, and the outputs they are


def sample(past: int, rows: int, rng: np.random.Generator) -> Sample:
    """A layer with causal rows."""
    q, k, v = (
        rng.standard_normal((length, heads, HEAD_DIM), dtype=np.float32)
        for length, heads in ((rows, HEADS), (past + rows, KV_HEADS), (past + rows, KV_HEADS))
    )
    bias = np.zeros((rows, past + rows), dtype=np.float32)
    bias[:, past:] = np.triu(np.full((rows, rows), MASKED), 1)
    return Sample(past, q, k, v, bias)


def _gqa_inputs(layer: Sample) -> dict[str, Array]:
    new = [part[layer.past :].reshape(1, layer.rows, -1) for part in (layer.k, layer.v)]
    total = layer.past + layer.rows
    return {
        "q": np.concatenate([layer.q.reshape(1, layer.rows, -1), *new], axis=-1),
        **{name: _cache(part, total) for name, part in (("k", layer.k), ("v", layer.v))},
        "seqlens_k": np.array([total - 1], dtype=np.int32), "total": np.array(total, dtype=np.int32),
        "bias": layer.bias[None, None],
    }  # fmt: skip


def _group_gqa_inputs(layer: Sample) -> dict[str, Array]:
    """Every group's heads as rows; of the keys and values that come with them, the first rows are real and the others masked."""
    rows, total = GROUP * layer.rows, layer.past + GROUP * layer.rows
    q = layer.group_rows.transpose(1, 0, 2).reshape(rows, -1)
    new = [np.tile(part[layer.past :].reshape(layer.rows, -1), (GROUP, 1)) for part in (layer.k, layer.v)]
    bias = np.full((rows, total), MASKED)
    bias[:, : layer.bias.shape[1]] = np.tile(layer.bias, (GROUP, 1))
    return {
        "q": np.concatenate([q, *new], axis=-1)[None],
        **{name: _cache(part, total) for name, part in (("k", layer.k), ("v", layer.v))},
        "seqlens_k": np.array([total - 1], dtype=np.int32), "total": np.array(total, dtype=np.int32),
        "bias": bias[None, None],
    }  # fmt: skip


def _cache(part: Array, total: int) -> Array:
    """As the engine keeps it.  # [T, KV_HEADS, HEAD_DIM] -> [1, KV_HEADS, total, HEAD_DIM]"""
    out = np.zeros((1, KV_HEADS, total, HEAD_DIM), dtype=np.float32)
    out[0, :, : len(part)] = part.transpose(1, 0, 2)
    return out


def _product_inputs(layer: Sample) -> dict[str, Array]:
    k, v = (np.ascontiguousarray(part.transpose(1, 0, 2)) for part in (layer.k, layer.v))
    return {"q": layer.group_rows, "k": k, "v": v, "bias": np.tile(layer.bias, (GROUP, 1))}


def _attention_inputs(layer: Sample) -> dict[str, Array]:
    q = np.ascontiguousarray(layer.q.transpose(1, 0, 2))[None]
    k, v = (np.ascontiguousarray(part.transpose(1, 0, 2))[None] for part in (layer.k, layer.v))
    return {"q": q, "k": k, "v": v, "bias": layer.bias}


def _multi_head_inputs(layer: Sample) -> dict[str, Array]:
    q = layer.group_rows.transpose(1, 0, 2).reshape(1, GROUP * layer.rows, -1)
    k, v = (part.reshape(1, len(part), -1) for part in (layer.k, layer.v))
    return {"q": np.ascontiguousarray(q), "k": k, "v": v, "bias": np.tile(layer.bias, (GROUP, 1))[None, None]}


def ways() -> list[Way]:
    """All formulations; the first is the engine's."""
    microsoft: dict[str, Any] = {"domain": "com.microsoft"}
    scale = HEAD_DIM**-0.5
    present = ["out", "present_k", "present_v"]
    gqa = ["q", "", "", "k", "v", "seqlens_k", "total", "", "", "", "bias"]
    softmax = [
        helper.make_node("Add", ["scores", "bias"], ["biased"]),
        helper.make_node("Softmax", ["biased"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "v"], ["out"]),
    ]
    by_query = helper.make_node("FusedMatMul", ["q", "k"], ["scores"], transB=1, alpha=scale, **microsoft)
    by_key = helper.make_node("FusedMatMul", ["k", "q"], ["columns"], transB=1, alpha=scale, **microsoft)
    turned = helper.make_node("Transpose", ["columns"], ["scores"], perm=[0, 2, 1])
    one = helper.make_node("GroupQueryAttention", gqa, present, num_heads=HEADS, kv_num_heads=KV_HEADS, **microsoft)
    grouped = helper.make_node(
        "GroupQueryAttention", gqa, present, num_heads=KV_HEADS, kv_num_heads=KV_HEADS, **microsoft
    )
    standard = helper.make_node("Attention", ["q", "k", "v", "bias"], ["out"])
    several = helper.make_node(
        "MultiHeadAttention", ["q", "k", "v", "", "", "bias"], ["out"], num_heads=KV_HEADS, **microsoft
    )
    return [
        Way("GroupQueryAttention", [one], _gqa_inputs, ("k", "v")),
        Way("the same, a group's heads as rows", [grouped], _group_gqa_inputs, ("k", "v")),
        Way("products, a group's heads as rows", [by_query, *softmax], _product_inputs),
        Way("products, keys on the left", [by_key, turned, *softmax], _product_inputs),
        Way("Attention, opset 24", [standard], _attention_inputs),
        Way("MultiHeadAttention, a group's heads as rows", [several], _multi_head_inputs),
    ]


class Bound:
    """A way, bound to the tensors of its layers."""

    def __init__(self, way: Way, layers: Sequence[Sample], threads: int) -> None:
        share_threads(ort, threads)
        options = session_options(ort, {})
        inputs = [way.inputs(layer) for layer in layers]
        graph = _graph(way, inputs)
        self._session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        self._kept: list[Any] = []
        self._first = len(way.shared)  # outputs are in the order they are bound in
        for index, arrays in enumerate(inputs):
            for name, array in arrays.items():
                value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
                self._kept.append(value)
                self._binding.bind_ortvalue_input(f"{name}{index}", value)
                if name in way.shared:
                    self._binding.bind_ortvalue_output(f"present_{name}{index}", value)
            self._binding.bind_output(f"out{index}")

    def run(self) -> float:
        """Milliseconds of all layers."""
        start = time.perf_counter()
        self._session.run_with_iobinding(self._binding)
        return (time.perf_counter() - start) * 1e3

    def output(self) -> Array:
        """Of the first layer, as it comes."""
        found: Array = self._binding.get_outputs()[self._first].numpy()
        return found


def _graph(way: Way, inputs: Sequence[dict[str, Array]]) -> onnx.ModelProto:
    """The way's nodes once a layer, each on inputs of its own."""
    nodes, declared, outputs = [], [], []
    for index, arrays in enumerate(inputs):
        for node in way.nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            for names in (copy.input, copy.output):
                names[:] = [f"{name}{index}" if name else "" for name in names]
            nodes.append(copy)
        for name, array in arrays.items():
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            declared.append(helper.make_tensor_value_info(f"{name}{index}", kind, array.shape))
        names = ["out", *(f"present_{name}" for name in way.shared)]
        outputs += [helper.make_tensor_value_info(f"{name}{index}", TensorProto.FLOAT, None) for name in names]
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(
        helper.make_graph(nodes, "attention", declared, outputs), opset_imports=opsets, ir_version=11
    )


def measure(past: int, rows: int, *, layers: int, rounds: int, threads: int) -> dict[str, float]:
    """Milliseconds of every way, medians of interleaved rounds.

    Args:
        past: rows before the new ones.
        rows: new ones.
        layers: each with a cache of its own.
        rounds: runs of each way; two more warm up.
        threads: of ONNX Runtime.
    """
    rng = np.random.default_rng(0)
    samples = [sample(past, rows, rng) for _ in range(layers)]
    bound = {way.name: Bound(way, samples, threads) for way in ways()}
    taken: dict[str, list[float]] = {name: [] for name in bound}
    for _ in range(rounds + 2):
        for name, each in bound.items():
            taken[name].append(each.run())
    return {name: median(times[2:]) for name, times in taken.items()}


def main(
    threads: Annotated[int, typer.Option(help="Of ONNX Runtime; 0: one a core.", min=0)] = 0,
    rounds: Annotated[int, typer.Option(help="Runs of each way.", min=1)] = 15,
    layers: Annotated[int, typer.Option(help="Layers, each with a cache of its own.", min=1)] = 30,
) -> None:
    """Print the table."""
    table = Table("past", "rows", *(way.name for way in ways()), title="ms, all layers")
    for past in PASTS:
        for rows in ROWS:
            found = measure(past, rows, layers=layers, rounds=rounds, threads=threads)
            table.add_row(str(past), str(rows), *(f"{ms:.2f}" for ms in found.values()))
    Console(width=130).print(table)


if __name__ == "__main__":
    typer.run(main)
