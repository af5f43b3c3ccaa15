"""Writes ``engine/`` of an export to TensorRT-LLM: what medusa-run reads, and through a builder scripts and engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from medusa_export.core.errors import ConfigError
from medusa_export.core.text.model_tokens import ModelTokens
from medusa_export.exporter.engine_dirs.common import save_engine_files
from medusa_export.exporter.plan.spec import ExportSpec
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.contract.engine_tools import EngineBuilder
from medusa_export.heads.contract.trtllm_releases import TrtllmRelease
from medusa_export.heads.trees.tree import MAX_TOP_K, Tree


def write_trtllm_engine(
    out: Path,
    trt_dir: Path,
    checkpoint: MedusaCheckpoint,
    spec: ExportSpec,
    *,
    tree: Tree,
    max_length: int,
    max_batch: int,
    release: TrtllmRelease,
    builder: EngineBuilder,
    progress: Callable[[str, int, int], None],
    save_tokenizer: Callable[[Path], Any],
    source: dict[str, Any],
    tokens: ModelTokens | None = None,
) -> None:
    """``out``: engine.json, tree.json, the tokenizer, and what the builder makes of the checkpoint in ``trt_dir``.

    Args:
        tree: of the checkpoint; the engine is built for exactly its size.
        max_length: tokens of prompt and answer together.
        max_batch: sequences at once.
    """
    config, weights = checkpoint.config, spec.weight_format.trtllm.algo or spec.dtype
    source = {**source, "tensorrt_llm": release.name}
    if (windows := config.windows_within(max_length)) is not None:
        source["sliding_window"] = windows
    out.mkdir()
    builder.build(trt_dir, out, progress, max_batch=max_batch, max_length=max_length, release=release)
    save_engine_files(
        out,
        checkpoint,
        tree,
        save_tokenizer,
        tokens,
        backend="tensorrt-llm",
        form=spec.weight_format.onnxruntime.form if spec.weight_format.onnxruntime else spec.weight_format.name,
        precision=f"{weights} weights, {spec.dtype} otherwise, TensorRT-LLM {release.name}",
        max_length=max_length,
        top_k=MAX_TOP_K,
        session_options={},
        heads_session_options={},
        source=source,
    )


def require_sizes(checkpoint: MedusaCheckpoint, max_length: int, max_batch: int) -> None:
    """Raise ConfigError for a context or a batch that cannot be built.

    Args:
        checkpoint: decides the longest context.
        max_length: tokens of a sequence, prompt and answer.
        max_batch: sequences at once.
    """
    longest = checkpoint.config.max_position_embeddings
    if not 2 <= max_length <= longest:
        raise ConfigError("--max-length", str(max_length), f"2 .. {longest}, the model's own context", "choose another")
    if max_batch < 1:
        raise ConfigError("--max-batch", str(max_batch), "1 or more", "correct it")
