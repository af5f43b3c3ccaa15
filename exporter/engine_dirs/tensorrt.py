"""Writes ``onnx/`` and ``engine/`` of an export to TensorRT: the portable graphs, and the engines that are built from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from medusa_export.core.text.model_tokens import ModelTokens
from medusa_export.exporter.engine_dirs.common import MIN_TOP_K, Excluded, save_engine_files
from medusa_export.exporter.onnx.portable.decoder import write_portable_decoder
from medusa_export.exporter.onnx.portable.heads import write_portable_heads
from medusa_export.exporter.onnx.portable.linear import PortableLinear
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.contract.engine_tools import EngineBuilder
from medusa_export.heads.trees.tree import Tree
from medusa_export.quantize.formats import Format
from medusa_export.quantize.scales import Scales
from medusa_export.quantize.tensorrt_targets import tensorrt_form

MAX_NODES = 64  # of a tree that an engine takes (see docs/decisions/0002); a larger --tree raises it


def write_portable(
    out: Path,
    checkpoint: MedusaCheckpoint,
    weight_format: Format,
    scales: Scales | None,
    *,
    dtype: str,
    tree: Tree,
    max_length: int,
    draft_vocab: torch.Tensor | None,
    tokens: ModelTokens | None = None,
    excluded: Excluded = lambda module: False,
) -> None:
    """``out/decoder.onnx`` and, where there are heads, ``out/heads.onnx``: what TensorRT is given.

    Args:
        dtype: "float16" or "bfloat16".
        tree: the heads give at least its candidates.
        draft_vocab: see :func:`write_portable_heads`.
        tokens: of the tokenizer; None: every row of the embedding is a token.
        excluded: whether a linear, by its Hugging Face name, stays in ``dtype``.
    """
    form, number = tensorrt_form(weight_format), getattr(torch, dtype)
    out.mkdir()
    linear = PortableLinear(checkpoint, form.form, number, scales, weight_format.group_size, excluded)
    write_portable_decoder(out, checkpoint, linear, max_length=max_length, num_tokens=tokens.count if tokens else None)
    if checkpoint.num_medusa_heads:
        write_portable_heads(out, checkpoint, dtype=number, top_k=_top_k(tree), draft_vocab=draft_vocab)


def write_tensorrt_engine(
    out: Path,
    onnx_dir: Path,
    checkpoint: MedusaCheckpoint,
    weight_format: Format,
    *,
    gpus: tuple[int, ...],
    dtype: str,
    tree: Tree,
    max_length: int,
    builder: EngineBuilder,
    progress: Callable[[str, int, int], None],
    save_tokenizer: Callable[[Path], Any],
    source: dict[str, Any],
    tokens: ModelTokens | None = None,
) -> None:
    """``out``: rank0.engine, heads.engine, what is in them as JSON, engine.json, tree.json and the tokenizer.

    Args:
        out: directory to make.
        onnx_dir: portable graphs, see :func:`write_portable`.
        checkpoint: base model and heads.
        weight_format: of the linears.
        gpus: compute capabilities: 89 for sm89.
        dtype: of activations: float16 or bfloat16.
        tree: the engine's tree.
        max_length: context, in tokens.
        builder: builds the engines.
        progress: called with (stage, done, total).
        save_tokenizer: writes the tokenizer's files into a directory.
        source: what engine.json says of the checkpoint.
        tokens: which ids texts may hold and which end one; None: config.json's.
    """
    form = tensorrt_form(weight_format)
    out.mkdir()
    nodes = tree.num_nodes
    builder.build(
        onnx_dir, out, progress, gpus=gpus, max_length=max_length, max_nodes=max(MAX_NODES, nodes), nodes=nodes
    )
    save_engine_files(
        out,
        checkpoint,
        tree,
        save_tokenizer,
        tokens,
        backend="tensorrt",
        form=form.form,
        precision=f"{form.precision}, {dtype} otherwise",
        max_length=max_length,
        top_k=_top_k(tree),
        session_options={},
        heads_session_options={},
        source=source,
    )


def _top_k(tree: Tree) -> int:
    """Candidates a head: also other trees than the default one can be tried without a new export."""
    return max(MIN_TOP_K, tree.top_k if tree.max_draft_len else 1)
