"""The Medusa heads as ONNX graphs: draft tokens from the one row of a sequence that verification accepted last.

There is a graph for every depth of tree, ``heads-{depth}.onnx``, with just the heads that such a tree uses; all share one data file.
"""

from __future__ import annotations

from pathlib import Path

import torch
from onnx import TensorProto

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.onnx.builder import ExternalData, GraphBuilder, silu
from medusa_export.exporter.onnx.matrices import int8_matrix
from medusa_export.heads.checkpoint import families
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.contract.engine_info import HEADS_DATA, heads_file


def write_heads(
    out: Path, checkpoint: MedusaCheckpoint, *, top_k: int, draft_vocab: torch.Tensor | None, int8: bool
) -> None:
    """Write ``heads-1.onnx`` .. ``heads-{num_medusa_heads}.onnx`` and their data.

    Input hidden_states float [B, hidden_size], a row a sequence; output draft_ids int64 [B, depth, top_k], best first.

    Drafts need not be exact, because the base model verifies them: the projection may be restricted to the most frequent tokens
    (FR-Spec, arXiv 2502.14856) and all matrices stored in 8 bits; that costs acceptance only, never correctness.

    Args:
        top_k: candidates a head.
        draft_vocab: int64 token ids to restrict the projection to, or None for the whole vocabulary.
        int8: store the heads' matrices and the projection in 8-bit blocks.

    Raises:
        ConfigError: fewer tokens to draw from than candidates.
    """
    available = checkpoint.config.vocab_size if draft_vocab is None else len(draft_vocab)
    if available < top_k:
        raise ConfigError("--draft-vocab", f"{available} tokens", f"at least {top_k}, a candidate each", "raise it")
    with ExternalData(out / HEADS_DATA) as data:
        for depth in range(1, checkpoint.num_medusa_heads + 1):
            with GraphBuilder(out / heads_file(depth), "medusa_heads", data) as graph:
                _write_depth(graph, checkpoint, depth, top_k, draft_vocab, int8)


def _write_depth(
    graph: GraphBuilder,
    checkpoint: MedusaCheckpoint,
    depth: int,
    top_k: int,
    draft_vocab: torch.Tensor | None,
    int8: bool,
) -> None:
    graph.input("hidden_states", TensorProto.FLOAT, ["B", checkpoint.config.hidden_size])
    graph.output("draft_ids", TensorProto.INT64, ["B", depth, top_k])
    rows = [_blocks(graph, checkpoint, head, int8) for head in range(depth)]  # [B, 1, h] each
    if checkpoint.heads_share_lm_head:
        stacked = graph.node("Concat", rows, axis=1)  # one product reads the shared projection once
        tokens = _top_k(graph, checkpoint, families.LM_HEAD, stacked, top_k, draft_vocab, int8)
    else:
        own = [f"medusa_heads.{head}.{checkpoint.num_medusa_layers}.weight" for head in range(depth)]
        best = [
            _top_k(graph, checkpoint, source, row, top_k, draft_vocab, int8)
            for source, row in zip(own, rows, strict=True)
        ]
        tokens = graph.node("Concat", best, axis=1)
    if draft_vocab is not None:
        tokens = graph.node("Gather", [graph.tensor("draft_vocab", draft_vocab), tokens])
    graph.node("Identity", [tokens], ["draft_ids"])


def _blocks(graph: GraphBuilder, checkpoint: MedusaCheckpoint, head: int, int8: bool) -> str:
    """The residual blocks of one head: x + silu(W x + b).  # [B, h] -> [B, 1, h]"""
    x = graph.node("Unsqueeze", ["hidden_states", graph.ints(1)])
    for layer in range(checkpoint.num_medusa_layers):
        name = f"medusa_heads.{head}.{layer}.linear"
        weight = checkpoint.read(f"{name}.weight")
        matrix = int8_matrix(graph, name, weight) if int8 else graph.tensor(f"{name}.weight", weight.float().T)
        bias = graph.tensor(f"{name}.bias", checkpoint.read(f"{name}.bias").float())
        product = graph.node("Add", [graph.node("MatMul", [x, matrix]), bias])
        x = graph.node("Add", [x, silu(graph, product)])
    return x


def _top_k(
    graph: GraphBuilder, checkpoint: MedusaCheckpoint, source: str, x: str, top_k: int,
    draft_vocab: torch.Tensor | None, int8: bool,
) -> str:  # fmt: skip
    """Indices of the best tokens of a vocabulary projection.  # [B, n, h] -> int64 [B, n, top_k]"""
    weight = checkpoint.read(source)
    weight = weight if draft_vocab is None else weight[draft_vocab]  # [V, h]
    matrix = int8_matrix(graph, source, weight) if int8 else graph.tensor(source, weight.float().T)
    return graph.node("TopK", [graph.node("MatMul", [x, matrix]), graph.ints(top_k)], 2, axis=-1)[1]
