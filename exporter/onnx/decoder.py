"""The decoder as a hand-built ONNX graph for ONNX Runtime.

The decoder verifies a block of tokens under a tree mask: GroupQueryAttention with packed QKV writes the new rows straight into the
shared KV buffers. Nodes must be in topological order (the operator is causal among the new tokens). The
heads are graphs of their own (onnx_heads.py): which node is accepted, only verification tells, and the vocabulary projection on every
node would cost more than the draft wins. Operator reference: onnxruntime's docs/ContribOperators.md.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from onnx import TensorProto

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.onnx.builder import MICROSOFT, GraphBuilder, first_columns, silu
from medusa_export.exporter.onnx.linear import LinearWriter
from medusa_export.heads.checkpoint import families
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.contract.engine_info import DECODER_FILE

HEAD_DIM_MULTIPLE = 16
EXPRESSIBLE = ("default", "linear", "dynamic", "llama3", "yarn")  # rotary scalings with one table of angles


def write_decoder(
    out: Path, checkpoint: MedusaCheckpoint, linear: LinearWriter, *, max_length: int, num_tokens: int | None = None
) -> None:
    """Write ``decoder.onnx`` (+ .data) into ``out``.

    Inputs: input_ids, position_ids int64 [B, S]; attention_bias float [1, 1, S, T]; seqlens_k int32 [B], the rows of each
    sequence after this run less 1; total_sequence_length int32 scalar, T, the rows of the longest; output_rows int64 [R], of
    B * S; past_key_values.{i}.key/value float [B, num_key_value_heads, max_length, head_dim]. Outputs: next_ids int64 [R];
    hidden_states float [R, hidden_size] (after the final norm); logits float [R, vocab_size]; present.{i}.key/value, to be
    bound to the same buffers as the past.

    Args:
        out: an existing directory.
        checkpoint: what the weights are read from.
        linear: writes linears in the form of a format.
        max_length: rows of the cache.
        num_tokens: ids from 0 on that next_ids are chosen from; None: all.

    Raises:
        ConfigError: a rotary scaling or a shape that the graph cannot express.
    """
    config = checkpoint.config
    require_supported(config, max_length)
    with GraphBuilder(out / DECODER_FILE, "decoder") as graph:
        _decoder_inputs(graph, config, max_length)
        for name, cache in zip(("cos_cache", "sin_cache"), rotary_caches(config, max_length), strict=True):
            graph.tensor(name, cache)
        table = graph.tensor(families.EMBED_TOKENS, checkpoint.read(families.EMBED_TOKENS))
        hidden = _to_float(graph, graph.node("Gather", [table, "input_ids"]), checkpoint, families.EMBED_TOKENS)
        norm = _norm_before(graph, checkpoint, linear, families.INPUT_LAYERNORM.format(0), _qkv(0))
        normed = graph.node(
            "SimplifiedLayerNormalization", [hidden, norm], axis=-1, epsilon=config.rms_norm_eps, stash_type=1
        )
        for layer in range(config.num_hidden_layers):
            normed, hidden = _block(graph, checkpoint, linear, layer, normed, hidden)
        flat = graph.node("Reshape", [normed, graph.ints(-1, config.hidden_size)])
        graph.node("Gather", [flat, "output_rows"], ["hidden_states"])
        _lm_head(graph, checkpoint, linear)
        graph.node(
            "ArgMax", [first_columns(graph, "logits", config.vocab_size, num_tokens)], ["next_ids"], axis=-1, keepdims=0
        )
        graph.output("next_ids", TensorProto.INT64, ["R"])
        graph.output("hidden_states", TensorProto.FLOAT, ["R", config.hidden_size])
        graph.output("logits", TensorProto.FLOAT, ["R", config.vocab_size])


def require_supported(config: DecoderConfig, max_length: int) -> None:
    """Raise ConfigError for what the graph cannot express, before any long work."""
    require_context(config, max_length)
    if config.head_dim % HEAD_DIM_MULTIPLE:
        expected = f"a multiple of {HEAD_DIM_MULTIPLE} (ONNX Runtime's GroupQueryAttention)"
        raise ConfigError("head_dim", str(config.head_dim), expected, "export with --engine none")


def require_context(config: DecoderConfig, max_length: int) -> None:
    """Raise ConfigError for a context that the model does not have, or positions that no ONNX graph here expresses."""
    if not 16 <= max_length <= config.max_position_embeddings:
        allowed = f"16 .. {config.max_position_embeddings}"
        raise ConfigError("--max-length", str(max_length), allowed, "choose a length the model was trained for")
    if config.sliding_window and config.sliding_window < max_length:
        got, action = (
            f"{config.sliding_window} with a context of {max_length}",
            f"pass --max-length {config.sliding_window}",
        )
        raise ConfigError("sliding_window", got, "a context within the window", action)
    rotary_caches(config, 1)


def rotary_caches(config: DecoderConfig, max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every position, with transformers' own frequencies.  # 2 x float32 [max_length, head_dim / 2]

    Dynamic scaling begins beyond max_position_embeddings, where no graph goes; up to there it is none.

    Raises:
        ConfigError: a rotary scaling whose frequencies depend on the sequence length.
    """
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope_type = (config.rope_scaling or {}).get("rope_type", "default")
    if rope_type not in EXPRESSIBLE:
        raise ConfigError(
            "rope_scaling", repr(rope_type), ", ".join(EXPRESSIBLE), "write a checkpoint with --format hf"
        )
    attention_factor = 1.0
    if rope_type in ("default", "dynamic"):
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        frequencies = 1.0 / (config.rope_theta**exponents)  # [head_dim / 2]
    else:
        hf_config = AutoConfig.for_model(**config.raw)
        frequencies, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](hf_config, torch.device("cpu"))
    angles = torch.outer(torch.arange(max_length, dtype=torch.float32), frequencies)
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def _decoder_inputs(graph: GraphBuilder, config: DecoderConfig, max_length: int) -> None:
    graph.input("input_ids", TensorProto.INT64, ["B", "S"])
    graph.input("position_ids", TensorProto.INT64, ["B", "S"])
    graph.input("attention_bias", TensorProto.FLOAT, [1, 1, "S", "T"])
    graph.input("seqlens_k", TensorProto.INT32, ["B"])
    graph.input("total_sequence_length", TensorProto.INT32, [])
    graph.input("output_rows", TensorProto.INT64, ["R"])
    cache: list[int | str] = ["B", config.num_key_value_heads, max_length, config.head_dim]
    for layer in range(config.num_hidden_layers):
        for kind in ("key", "value"):
            graph.input(f"past_key_values.{layer}.{kind}", TensorProto.FLOAT, cache)
            graph.output(f"present.{layer}.{kind}", TensorProto.FLOAT, cache)


def _block(
    graph: GraphBuilder, checkpoint: MedusaCheckpoint, linear: LinearWriter, layer: int, normed: str, hidden: str
) -> tuple[str, str]:  # fmt: skip
    """One decoder layer. Returns the next layer's normed input and the residual stream."""
    attention = _attention(graph, checkpoint, linear, layer, normed)
    attention = linear(graph, attention, [families.O_PROJ.format(layer)])
    name = families.POST_ATTENTION_LAYERNORM.format(layer)
    pair = [families.GATE_PROJ.format(layer), families.UP_PROJ.format(layer)]
    weight = _norm_before(graph, checkpoint, linear, name, pair)
    normed, hidden = _add_norm(graph, checkpoint, attention, hidden, name, weight)
    gate, up = _gate_and_up(graph, linear, pair, normed)
    down_proj = families.DOWN_PROJ.format(layer)
    product = graph.node("Mul", [silu(graph, gate), up])
    mlp = linear(graph, product, [down_proj], smoothed=linear.smooths_up(down_proj, pair[1]))
    if layer == checkpoint.config.num_hidden_layers - 1:
        name = families.FINAL_NORM
        return _add_norm(graph, checkpoint, mlp, hidden, name, _norm_weight(graph, checkpoint, name))
    name = families.INPUT_LAYERNORM.format(layer + 1)
    weight = _norm_before(graph, checkpoint, linear, name, _qkv(layer + 1))
    return _add_norm(graph, checkpoint, mlp, hidden, name, weight)


def _qkv(layer: int) -> list[str]:
    return [name.format(layer) for name in (families.Q_PROJ, families.K_PROJ, families.V_PROJ)]


def _gate_and_up(graph: GraphBuilder, linear: LinearWriter, pair: list[str], normed: str) -> tuple[str, str]:
    """One product where both take the same input, which saves a start of all threads; else two, under one FP8 scale."""
    gate_proj, up_proj = pair
    if linear.takes_as_one(pair):
        packed = linear(graph, normed, pair, smoothed=linear.folds(pair))
        gate, up = graph.node("Split", [packed], 2, axis=-1, num_outputs=2)
        return gate, up
    gate = linear(graph, normed, [gate_proj], scale_with=[up_proj])
    return gate, linear(graph, normed, [up_proj], scale_with=[gate_proj])


def _attention(graph: GraphBuilder, checkpoint: MedusaCheckpoint, linear: LinearWriter, layer: int, normed: str) -> str:
    """Packed QKV, rotary embedding, cache update and tree attention.  # [B, S, h] -> [B, S, num_attention_heads * head_dim]"""
    config, modules = checkpoint.config, _qkv(layer)
    packed = linear(graph, normed, modules, smoothed=linear.folds(modules))
    query, key, value = packed, "", ""
    if config.family.qk_norm:
        sizes = graph.ints(config.q_size, config.kv_size, config.kv_size)
        query, key, value = graph.node("Split", [packed, sizes], 3, axis=-1)
        query = _head_norm(graph, checkpoint, query, families.Q_NORM.format(layer), config.q_size)
        key = _head_norm(graph, checkpoint, key, families.K_NORM.format(layer), config.kv_size)
    past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
    lengths = ["seqlens_k", "total_sequence_length", "cos_cache", "sin_cache", "position_ids", "attention_bias"]
    outputs = [f"attention.{layer}", f"present.{layer}.key", f"present.{layer}.value"]
    return graph.node(
        "GroupQueryAttention",
        [query, key, value, *past, *lengths],
        outputs,
        domain=MICROSOFT,
        num_heads=config.num_attention_heads,
        kv_num_heads=config.num_key_value_heads,
        do_rotary=1,
        rotary_interleaved=0,
        scale=1.0 / math.sqrt(config.head_dim),
    )[0]


def _head_norm(graph: GraphBuilder, checkpoint: MedusaCheckpoint, x: str, weight: str, size: int) -> str:
    """RMSNorm over each head (Qwen3).  # [B, S, size] -> [B, S, size]"""
    config = checkpoint.config
    heads = graph.node("Reshape", [x, graph.ints(0, 0, size // config.head_dim, config.head_dim)])
    scale = _norm_weight(graph, checkpoint, weight)
    heads = graph.node(
        "SimplifiedLayerNormalization", [heads, scale], axis=-1, epsilon=config.rms_norm_eps, stash_type=1
    )
    return graph.node("Reshape", [heads, graph.ints(0, 0, size)])


def _add_norm(
    graph: GraphBuilder, checkpoint: MedusaCheckpoint, x: str, residual: str, name: str, weight: str
) -> tuple[str, str]:
    """RMSNorm of x + residual, and the sum itself."""
    outputs = graph.node(
        "SkipSimplifiedLayerNormalization",
        [x, residual, weight],
        [f"{name}.normed", "", "", f"{name}.sum"],
        domain=MICROSOFT,
        epsilon=checkpoint.config.rms_norm_eps,
    )
    return outputs[0], outputs[3]


def _lm_head(graph: GraphBuilder, checkpoint: MedusaCheckpoint, linear: LinearWriter) -> None:
    """hidden_states [R, h] -> logits [R, V]; a tied projection reuses the embedding table, transposed when the session is made."""
    if linear.vocabulary is not None:
        linear.vocabulary.write(graph, "hidden_states", "lm_head", checkpoint.read(families.LM_HEAD), "logits")
        return
    source = families.EMBED_TOKENS if checkpoint.config.tie_word_embeddings else families.LM_HEAD
    stored = graph.tensor(source, checkpoint.read(source))
    weight = graph.node("Transpose", [_to_float(graph, stored, checkpoint, source)], perm=[1, 0])
    graph.node("MatMul", ["hidden_states", weight], ["logits"])


def _norm_before(
    graph: GraphBuilder, checkpoint: MedusaCheckpoint, linear: LinearWriter, name: str, modules: list[str]
) -> str:
    """A norm's weight times the smoothing factors of the linears behind it, where they can be folded."""
    weight = _norm_weight(graph, checkpoint, name)
    return str(graph.node("Mul", [weight, linear.factor(graph, modules)])) if linear.folds(modules) else weight


def _norm_weight(graph: GraphBuilder, checkpoint: MedusaCheckpoint, name: str) -> str:
    return graph.tensor(name, checkpoint.read(name).float())


def _to_float(graph: GraphBuilder, value: str, checkpoint: MedusaCheckpoint, source: str) -> str:
    return value if checkpoint.dtype(source) == "float32" else graph.node("Cast", [value], to=TensorProto.FLOAT)
