"""The decoder as a graph of standard ONNX operators alone: what TensorRT builds its engine from, and ONNX Runtime proves right.

The KV cache has a fixed length and is written in place (TensorScatter), so every step of a tree has the same shapes whatever is in
it: an engine runs it as one CUDA graph. Mask and positions follow from the tree and the rows in the cache, inside the graph. No
value is made of a shape: TensorRT has those on the host, and would copy them to the device in every run. Operators: ONNX opset 24
(onnx.ai/onnx/operators). TensorRT's limits: Attention has one output, the cache is an input and an output of the network with one
address (its KVCacheUpdate layer, 10.15 and newer).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from onnx import TensorProto

from medusa_export.exporter.onnx.builder import GraphBuilder, first_columns
from medusa_export.exporter.onnx.decoder import rotary_caches
from medusa_export.exporter.onnx.portable.linear import ONNX_DTYPE, PortableLinear
from medusa_export.heads.checkpoint import families
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.contract.engine_info import DECODER_FILE


def write_portable_decoder(
    out: Path, checkpoint: MedusaCheckpoint, linear: PortableLinear, *, max_length: int, num_tokens: int | None = None
) -> None:
    """Write ``decoder.onnx`` (+ .data) into ``out``; floats are in ``linear.dtype`` where nothing else is said.

    Inputs: input_ids int64 [1, S]; position_offsets int64 [1, S], of each new token from past_length; past_length int64 [1], the rows
    in the cache; total_length int64 [1], past_length + S; tree_mask bool [1, 1, S, S], which new token sees which; output_rows int64
    [R], of the S;
    past_key_values.{i}.key/value [1, num_key_value_heads, max_length, head_dim]. Outputs: next_ids int64 [R]; hidden_states
    [R, hidden_size] (after the final norm); logits float32 [R, vocab_size]; present.{i}.key/value, to be bound to the same
    buffers as the past. total_length may not exceed max_length.

    Args:
        out: an existing directory.
        checkpoint: what the weights are read from.
        linear: writes linears in the form of a format, and decides the dtype.
        max_length: rows of the cache.
        num_tokens: ids from 0 on that next_ids are chosen from; None: all.
    """
    config = checkpoint.config
    with GraphBuilder(out / DECODER_FILE, "decoder", opsets=linear.opsets) as graph:
        _inputs(graph, config, linear.dtype, max_length)
        shared = _Shared(graph, config, linear.dtype, max_length)
        table = linear.matrix(graph, families.EMBED_TOKENS)
        hidden = graph.node("Gather", [table, "input_ids"])  # [1, S, h]
        for layer in range(config.num_hidden_layers):
            normed = _norm(graph, linear, hidden, families.INPUT_LAYERNORM.format(layer))
            attention = _attention(graph, linear, shared, layer, normed)
            hidden = graph.node("Add", [hidden, linear(graph, attention, [families.O_PROJ.format(layer)])])
            normed = _norm(graph, linear, hidden, families.POST_ATTENTION_LAYERNORM.format(layer))
            hidden = graph.node("Add", [hidden, _mlp(graph, linear, layer, normed)])
        rows = graph.node("Gather", [hidden, "output_rows"], axis=1)  # [1, R, h]
        flat = graph.node("Reshape", [rows, graph.ints(-1, config.hidden_size)])
        normed = _norm(graph, linear, flat, families.FINAL_NORM)
        graph.node("Identity", [normed], ["hidden_states"])
        _lm_head(graph, checkpoint, linear, normed, num_tokens)
        graph.output("hidden_states", ONNX_DTYPE[linear.dtype], ["R", config.hidden_size])
        graph.output("logits", TensorProto.FLOAT, ["R", config.vocab_size])
        graph.output("next_ids", TensorProto.INT64, ["R"])


class _Shared:
    """What all layers read: made once from the inputs.

    Attributes:
        cos, sin: of the new tokens' positions.  # [1, S, head_dim / 2]
        visible: which row of the cache each new token attends to.  # bool [1, 1, S, max_length]
    """

    def __init__(self, graph: GraphBuilder, config: DecoderConfig, dtype: torch.dtype, max_length: int) -> None:
        positions = graph.node("Add", ["position_offsets", "past_length"])  # [1, S]
        caches = zip(("cos_cache", "sin_cache"), rotary_caches(config, max_length), strict=True)
        self.cos, self.sin = (
            graph.node("Gather", [graph.tensor(name, cache.to(dtype)), positions]) for name, cache in caches
        )
        self.visible = _visible(graph, max_length)


def _visible(graph: GraphBuilder, max_length: int) -> str:
    """The past, and of the rows behind it what the tree says.  # bool [1, 1, S, max_length]"""
    columns = graph.tensor("columns", torch.arange(max_length, dtype=torch.int64))
    relative = graph.node(
        "Sub", [columns, "past_length"]
    )  # [T]: below 0 in the past, the number of a new token behind it
    last = graph.node(
        "Sub", [graph.node("Sub", ["total_length", "past_length"]), graph.ints(1)]
    )  # not from a Shape: see above
    number = graph.node("Min", [graph.node("Max", [relative, graph.ints(0)]), last])
    tree = graph.node("Gather", ["tree_mask", number], axis=3)  # [1, 1, S, T]
    in_past, in_use = (graph.node("Less", [columns, end]) for end in ("past_length", "total_length"))
    return graph.node("Or", [in_past, graph.node("And", [in_use, tree])])


def _inputs(graph: GraphBuilder, config: DecoderConfig, dtype: torch.dtype, max_length: int) -> None:
    graph.input("input_ids", TensorProto.INT64, [1, "S"])
    graph.input("position_offsets", TensorProto.INT64, [1, "S"])
    graph.input("past_length", TensorProto.INT64, [1])
    graph.input("total_length", TensorProto.INT64, [1])
    graph.input("tree_mask", TensorProto.BOOL, [1, 1, "S", "S"])
    graph.input("output_rows", TensorProto.INT64, ["R"])
    cache: list[int | str] = [1, config.num_key_value_heads, max_length, config.head_dim]
    for layer in range(config.num_hidden_layers):
        for kind in ("key", "value"):
            graph.input(f"past_key_values.{layer}.{kind}", ONNX_DTYPE[dtype], cache)
            graph.output(f"present.{layer}.{kind}", ONNX_DTYPE[dtype], cache)


def _attention(graph: GraphBuilder, linear: PortableLinear, shared: _Shared, layer: int, normed: str) -> str:
    """Fused QKV, rotary embedding, cache update and tree attention.  # [1, S, h] -> [1, S, num_attention_heads * head_dim]"""
    config = linear.checkpoint.config
    packed = linear(graph, normed, [name.format(layer) for name in (families.Q_PROJ, families.K_PROJ, families.V_PROJ)])
    sizes = graph.ints(config.q_size, config.kv_size, config.kv_size)
    query, key, value = graph.node("Split", [packed, sizes], 3, axis=-1)
    query = _heads(graph, linear, query, families.Q_NORM.format(layer))
    key = _heads(graph, linear, key, families.K_NORM.format(layer))
    query, key = (graph.node("RotaryEmbedding", [x, shared.cos, shared.sin]) for x in (query, key))
    value = _heads(graph, linear, value, "")
    present = []
    for kind, rows in (("key", key), ("value", value)):
        past = [f"past_key_values.{layer}.{kind}", rows, "past_length"]
        present.append(graph.node("TensorScatter", past, [f"present.{layer}.{kind}"], axis=2, mode="linear"))
    attention = graph.node(
        "Attention", [query, *present, shared.visible], is_causal=0, scale=1.0 / math.sqrt(config.head_dim)
    )  # [1, num_attention_heads, S, head_dim]
    rows = graph.node("Transpose", [attention], perm=[0, 2, 1, 3])
    return graph.node("Reshape", [rows, graph.ints(1, -1, config.q_size)])


def _heads(graph: GraphBuilder, linear: PortableLinear, x: str, norm: str) -> str:
    """Heads apart, normed where the family norms them.  # [1, S, n * head_dim] -> [1, n, S, head_dim]"""
    config = linear.checkpoint.config
    x = graph.node("Reshape", [x, graph.ints(0, 0, -1, config.head_dim)])
    if norm and config.family.qk_norm:
        x = _norm(graph, linear, x, norm)
    return graph.node("Transpose", [x], perm=[0, 2, 1, 3])


def _mlp(graph: GraphBuilder, linear: PortableLinear, layer: int, normed: str) -> str:
    """down(silu(gate(x)) * up(x)).  # [1, S, h] -> [1, S, h]"""
    gate_proj, up_proj = families.GATE_PROJ.format(layer), families.UP_PROJ.format(layer)
    gate = linear(graph, normed, [gate_proj], scale_with=[up_proj])
    up = linear(graph, normed, [up_proj], scale_with=[gate_proj])
    product = graph.node("Mul", [graph.node("Mul", [gate, graph.node("Sigmoid", [gate])]), up])
    return linear(graph, product, [families.DOWN_PROJ.format(layer)])


def _norm(graph: GraphBuilder, linear: PortableLinear, x: str, weight: str) -> str:
    """RMSNorm over the last axis, its sum in float32."""
    epsilon = linear.checkpoint.config.rms_norm_eps
    return graph.node("RMSNormalization", [x, linear.matrix(graph, weight)], axis=-1, epsilon=epsilon, stash_type=1)


def _lm_head(
    graph: GraphBuilder, checkpoint: MedusaCheckpoint, linear: PortableLinear, hidden: str, num_tokens: int | None
) -> None:
    """[R, h] -> logits [R, V] and next_ids [R]; a tied projection is the embedding's own table."""
    source = families.EMBED_TOKENS if checkpoint.config.tie_word_embeddings else families.LM_HEAD
    product = graph.node("Gemm", [hidden, linear.matrix(graph, source)], transB=1)
    graph.node("Cast", [product], ["logits"], to=TensorProto.FLOAT)
    known = first_columns(graph, product, checkpoint.config.vocab_size, num_tokens)
    graph.node("ArgMax", [known], ["next_ids"], axis=-1, keepdims=0)
