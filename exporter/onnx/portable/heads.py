"""The Medusa heads as a graph of standard ONNX operators: draft tokens from the one row that verification accepted."""

from __future__ import annotations

from pathlib import Path

import torch
from onnx import TensorProto

from medusa_export.exporter.onnx.builder import ExternalData, GraphBuilder
from medusa_export.exporter.onnx.portable.linear import ONNX_DTYPE, OPSETS
from medusa_export.heads.checkpoint import families
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.contract.engine_info import HEADS_DATA, HEADS_FILE


def write_portable_heads(
    out: Path, checkpoint: MedusaCheckpoint, *, dtype: torch.dtype, top_k: int, draft_vocab: torch.Tensor | None
) -> None:
    """Write ``heads.onnx`` (+ .data) into ``out``.

    Input hidden_states [1, hidden_size] in ``dtype``; output draft_ids int64 [num_medusa_heads, top_k], best first.

    Args:
        top_k: candidates a head.
        draft_vocab: int64 token ids to restrict the projection to, or None for the whole vocabulary. Restricted, the engine of
            the heads does not hold the whole vocabulary projection a second time.
    """
    layers, heads = checkpoint.num_medusa_layers, range(checkpoint.num_medusa_heads)

    def constant(graph: GraphBuilder, name: str, rows: torch.Tensor | None = None) -> str:
        value = checkpoint.read(name)
        return graph.tensor(name, (value if rows is None else value[rows]).to(dtype))

    def blocks(graph: GraphBuilder, head: int) -> str:
        """x + silu(W x + b), layer after layer.  # [1, h] -> [1, h]"""
        x = "hidden_states"
        for layer in range(layers):
            pair = [constant(graph, f"medusa_heads.{head}.{layer}.linear.{kind}") for kind in ("weight", "bias")]
            product = graph.node("Gemm", [x, *pair], transB=1)
            x = graph.node("Add", [x, graph.node("Mul", [product, graph.node("Sigmoid", [product])])])
        return x

    def best(graph: GraphBuilder, x: str, source: str) -> str:
        """[rows, h] -> int64 [rows, top_k]"""
        logits = graph.node("Gemm", [x, constant(graph, source, draft_vocab)], transB=1)
        tokens: str = graph.node("TopK", [logits, graph.ints(top_k)], 2, axis=-1)[1]
        return tokens

    with (
        ExternalData(out / HEADS_DATA) as data,
        GraphBuilder(out / HEADS_FILE, "medusa_heads", data, OPSETS) as graph,
    ):
        graph.input("hidden_states", ONNX_DTYPE[dtype], [1, checkpoint.config.hidden_size])
        graph.output("draft_ids", TensorProto.INT64, [len(heads), top_k])
        rows = [blocks(graph, head) for head in heads]
        if checkpoint.heads_share_lm_head:  # one product reads the shared projection once
            tokens = best(graph, graph.node("Concat", rows, axis=0), families.LM_HEAD)
        else:
            found = [
                best(graph, row, f"medusa_heads.{head}.{layers}.weight") for head, row in zip(heads, rows, strict=True)
            ]
            tokens = graph.node("Concat", found, axis=0)
        if draft_vocab is not None:
            tokens = graph.node("Gather", [graph.tensor("draft_vocab", draft_vocab), tokens])
        graph.node("Identity", [tokens], ["draft_ids"])
