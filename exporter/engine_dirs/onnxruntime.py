"""Writes ``onnx/`` and ``engine/`` of an export: the exchange graph, and what ONNX Runtime runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from medusa_export.core.text.model_tokens import ModelTokens
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.exporter.engine_dirs.common import MIN_TOP_K, Excluded, save_engine_files
from medusa_export.exporter.onnx.batch_decoder import write_batch_decoder
from medusa_export.exporter.onnx.decoder import require_supported, write_decoder
from medusa_export.exporter.onnx.forms import onnx_form
from medusa_export.exporter.onnx.heads import write_heads
from medusa_export.exporter.onnx.linear import LinearWriter
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.trees.tree import Tree
from medusa_export.quantize.formats import FORMATS, INT8_PRODUCTS, Format
from medusa_export.quantize.scales import Scales


def write_onnx(
    out: Path,
    checkpoint: MedusaCheckpoint,
    weight_format: Format,
    scales: Scales | None,
    *,
    max_length: int,
    tokens: ModelTokens | None = None,
    excluded: Excluded = lambda module: False,
) -> None:
    """``out/decoder.onnx`` with the numerics that TensorRT-LLM gets: rounded activations too, where the format has a scale for them.

    Args:
        tokens: of the tokenizer; None: every row of the embedding is a token.
        excluded: whether a linear, by its Hugging Face name, stays in float.
    """
    form = onnx_form(weight_format)
    activations = getattr(torch, form.activations) if form.activations else None
    linear = LinearWriter(checkpoint, form.form, scales, activations, weight_format.group_size, excluded)
    out.mkdir()
    write_decoder(out, checkpoint, linear, max_length=max_length, num_tokens=tokens.count if tokens else None)


def write_engine(
    out: Path,
    checkpoint: MedusaCheckpoint,
    weight_format: Format,
    scales: Scales | None,
    *,
    tree: Tree,
    max_length: int,
    draft_vocab: torch.Tensor | None,
    save_tokenizer: Callable[[Path], Any],
    source: dict[str, Any],
    tokens: ModelTokens | None = None,
    excluded: Excluded = lambda module: False,
) -> None:
    """``out``: the decoder for one sequence and for several, heads-{depth}.onnx, engine.json, tree.json and the tokenizer.

    Nothing outside it is needed to run. Activations stay in float32 here for FP8: a CPU has no FP8 arithmetic to gain from, and
    rounding them turns the noise between a single step and a tree step into different tokens (see docs/decisions). Rounded to INT8
    they make products of integers, which have no such noise.

    Args:
        out: directory to make.
        checkpoint: base model and heads.
        weight_format: of the linears.
        scales: of a calibration, for formats that take one.
        tree: the engine's tree.
        max_length: context, in tokens.
        draft_vocab: ids that heads may draft, ascending; None: all.  # [D]
        save_tokenizer: writes the tokenizer's files into a directory.
        source: what engine.json says of the checkpoint.
        tokens: which ids texts may hold and which end one; None: config.json's.
        excluded: whether a linear stays in float, by its Hugging Face name.
    """
    form = onnx_form(weight_format)
    config, num_heads = checkpoint.config, checkpoint.num_medusa_heads
    top_k = max(MIN_TOP_K, tree.top_k if tree.max_draft_len else 1)
    out.mkdir()
    activations = getattr(torch, form.activations) if form.activations and form.integers else None
    linear = LinearWriter(checkpoint, form.form, scales, activations, weight_format.group_size, excluded)
    write_decoder(out, checkpoint, linear, max_length=max_length, num_tokens=tokens.count if tokens else None)
    write_batch_decoder(out, config)
    if num_heads:
        write_heads(out, checkpoint, top_k=top_k, draft_vocab=draft_vocab, int8=config.hidden_size % 16 == 0)
    save_engine_files(
        out,
        checkpoint,
        tree,
        save_tokenizer,
        tokens,
        backend="onnxruntime",
        form=form.form,
        precision=form.precision,
        max_length=max_length,
        top_k=top_k,
        session_options=dict(form.session_options),
        heads_session_options=INT8_PRODUCTS,
        source=source,
        exact_products=form.integers,
    )


def write_base_engine(
    out: Path,
    model: Path,
    *,
    source: dict[str, str],
    max_length: int | None = None,
    chat_template: Path | None = None,
) -> None:
    """An engine of a base model that has no heads (yet): what writes the conversations that they are trained on.

    Args:
        source: what the engine says it was made from.
        max_length: its context; None: the model's, up to 2048.
        chat_template: a file with the template to use instead of the tokenizer's own.
    """
    checkpoint, tokenizer = MedusaCheckpoint.open_base(model), read_tokenizer(model, chat_template)
    config = checkpoint.config
    longest = min(max_length or 2048, config.max_position_embeddings)
    require_supported(config, longest)
    write_engine(
        out, checkpoint, FORMATS["none"], None, tree=Tree(()), max_length=longest, draft_vocab=None,
        save_tokenizer=tokenizer.save_pretrained, source={**source, "quant": "none"},
        tokens=ModelTokens.of(tokenizer, config.eos_token_ids, vocab_size=config.vocab_size),
    )  # fmt: skip
