"""The decoder for trees of several sequences at once: ``decoder.onnx`` with another attention, on the same weights.

GroupQueryAttention (ONNX Runtime 1.32, CPU) takes several rows behind a past for one sequence only. Here attention is plain
products: scores of the past and of the new rows side by side, one softmax over both. The query heads of a group are rows of one
product, so that keys and values are read once a group. The past is only read and the new rows are only written: nothing of the
cache's size is copied.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from medusa_export.exporter.onnx.builder import MICROSOFT, GraphBuilder
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.contract.engine_info import BATCH_DECODER_FILE, DECODER_FILE

CACHE = "past_key_values."


def write_batch_decoder(out: Path, config: DecoderConfig) -> None:
    """Write ``decoder-batch.onnx`` beside a ``decoder.onnx``, whose data file both use.

    Inputs: input_ids, position_ids int64 [B, S]; attention_bias float [B, 1, S, C + S]; output_rows int64 [R], of B * S;
    past_key_values.{i}.key/value float [B, num_key_value_heads, C, head_dim], where rows that a sequence does not have are masked
    by the bias. Outputs: next_ids, hidden_states and logits as those of the decoder; present.{i}.key/value float
    [B, num_key_value_heads, S, head_dim], the new rows alone.
    """
    source = onnx.load(out / DECODER_FILE, load_external_data=False).graph
    with GraphBuilder.beside(out / BATCH_DECODER_FILE, source) as graph:
        _inputs(graph, config)
        shared = _shared(graph, config)
        for node in source.node:
            if node.op_type == "GroupQueryAttention":
                _attention(graph, config, node, *shared)
            else:
                graph.take(node)
        for output in source.output:
            if not output.name.startswith("present."):
                graph.take_output(output)


def _inputs(graph: GraphBuilder, config: DecoderConfig) -> None:
    graph.input("input_ids", TensorProto.INT64, ["B", "S"])
    graph.input("position_ids", TensorProto.INT64, ["B", "S"])
    graph.input("attention_bias", TensorProto.FLOAT, ["B", 1, "S", "C + S"])
    graph.input("output_rows", TensorProto.INT64, ["R"])
    heads, size = config.num_key_value_heads, config.head_dim
    for layer in range(config.num_hidden_layers):
        for kind in ("key", "value"):
            graph.input(f"{CACHE}{layer}.{kind}", TensorProto.FLOAT, ["B", heads, "C", size])
            graph.output(f"present.{layer}.{kind}", TensorProto.FLOAT, ["B", heads, "S", size])


def _shared(graph: GraphBuilder, config: DecoderConfig) -> tuple[str, str]:
    """What all layers use: the bias of every row and query head of a group, [B, 1, S * G, C + S], and the sizes [C, S]."""
    group = config.num_attention_heads // config.num_key_value_heads
    bias = graph.node("Unsqueeze", ["attention_bias", graph.ints(3)])  # [B, 1, S, 1, C + S]
    bias = graph.node("Expand", [bias, graph.ints(1, 1, 1, group, 1)])
    past = graph.node("Shape", [f"{CACHE}0.key"], start=2, end=3)
    new = graph.node("Shape", ["input_ids"], start=1, end=2)
    total = graph.node("Add", [past, new])
    rows = graph.node("Concat", [graph.ints(0, 1, -1), total], axis=0)
    return graph.node("Reshape", [bias, rows]), graph.node("Concat", [past, new], axis=0)


def _attention(graph: GraphBuilder, config: DecoderConfig, node: onnx.NodeProto, bias: str, sizes: str) -> None:
    """Replaces one GroupQueryAttention: the same query, key and value in, the same output out.  # -> [B, S, H * D]"""
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    query, key, value = _rotated(graph, config, list(node.input))
    past_key, past_value = node.input[3:5]
    rows = graph.node("Reshape", [query, graph.ints(0, 0, groups, heads // groups, size)])  # [B, S, K, G, D]
    rows = graph.node("Transpose", [rows], perm=[0, 2, 1, 3, 4])
    rows = graph.node("Reshape", [rows, graph.ints(0, 0, -1, size)])  # [B, K, S * G, D]
    new_key, new_value = (
        _by_head(graph, x, groups, size, y) for x, y in zip((key, value), node.output[1:], strict=True)
    )
    scores = [_product(graph, rows, keys, transB=1, alpha=1.0 / math.sqrt(size)) for keys in (past_key, new_key)]
    scores = graph.node("Add", [graph.node("Concat", scores, axis=-1), bias])  # [B, K, S * G, C + S]
    shares = graph.node("Split", [graph.node("Softmax", [scores], axis=-1), sizes], 2, axis=-1)
    values = [_product(graph, *pair) for pair in zip(shares, (past_value, new_value), strict=True)]
    out = graph.node("Reshape", [graph.node("Add", values), graph.ints(0, 0, -1, heads // groups, size)])
    out = graph.node("Transpose", [out], perm=[0, 2, 1, 3, 4])  # [B, S, K, G, D]
    graph.node("Reshape", [out, graph.ints(0, 0, heads * size)], [node.output[0]])


def _rotated(graph: GraphBuilder, config: DecoderConfig, inputs: list[str]) -> Iterable[str]:
    """Query, key and value, [B, S, heads * D] each, the first two with rotary embedding; packed or not, as they come."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads

    def rotate(x: str, num_heads: int) -> str:
        caches = ["position_ids", graph.stored("cos_cache"), graph.stored("sin_cache")]
        return str(graph.node("RotaryEmbedding", [x, *caches], domain=MICROSOFT, num_heads=num_heads))

    packed, key, value = inputs[:3]
    if key:
        return rotate(packed, heads), rotate(key, groups), value
    both, value = graph.node("Split", [packed, graph.ints(config.q_size + config.kv_size, config.kv_size)], 2, axis=-1)
    query, key = graph.node(
        "Split", [rotate(both, heads + groups), graph.ints(config.q_size, config.kv_size)], 2, axis=-1
    )
    return query, key, value


def _by_head(graph: GraphBuilder, x: str, heads: int, size: int, output: str) -> str:
    """[B, S, heads * D] -> [B, heads, S, D], which is also an output of the graph."""
    split = graph.node("Reshape", [x, graph.ints(0, 0, heads, size)])
    graph.node("Transpose", [split], [output], perm=[0, 2, 1, 3])
    return output


def _product(graph: GraphBuilder, left: str, right: str, **attributes: Any) -> str:
    return str(graph.node("FusedMatMul", [left, right], domain=MICROSOFT, **attributes))
