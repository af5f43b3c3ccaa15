"""What checks and writes each kind of engine, by the name that --engine has for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medusa_export.core.errors import require_packages
from medusa_export.exporter.engine_dirs.onnxruntime import write_engine, write_onnx
from medusa_export.exporter.engine_dirs.tensorrt import write_portable, write_tensorrt_engine
from medusa_export.exporter.engine_dirs.trtllm import require_sizes, write_trtllm_engine
from medusa_export.exporter.job.draft_vocab import most_frequent_tokens
from medusa_export.exporter.job.job import Job
from medusa_export.exporter.onnx.decoder import require_context, require_supported
from medusa_export.exporter.onnx.forms import onnx_form
from medusa_export.exporter.plan.module_names import TRTLLM_LINEARS, trtllm_linear
from medusa_export.heads.contract.engine_tools import EngineBuilder, Progress
from medusa_export.quantize.scales import Scales


@dataclass(frozen=True)
class EngineWriter:
    """What writes one kind of engine.

    Attributes:
        check: raises what cannot be built, before any work.
        require: (job, builder) raises what the builder cannot do on this machine, before any work.
        write_graph: (job, scales, path) writes ``onnx/``, for the kinds that have a graph.
        write_engine: (job, scales, path, builder, progress) writes ``engine/``, after what it is made of.
    """

    check: Callable[[Job], None]
    require: Callable[[Job, EngineBuilder], None]
    write_graph: Callable[[Job, Scales | None, Path], None]
    write_engine: Callable[[Job, Scales | None, Path, EngineBuilder, Progress], None]


def _check_onnxruntime(job: Job) -> None:
    require_packages("onnxruntime", extra="onnx")  # it opens what was written, in the end
    onnx_form(job.weight_format)
    require_supported(job.checkpoint.config, job.max_length)


def _write_onnx(job: Job, scales: Scales | None, path: Path) -> None:
    write_onnx(
        path,
        job.checkpoint,
        job.weight_format,
        scales,
        max_length=job.max_length,
        tokens=job.tokens,
        excluded=_excluded(job),
    )


def _write_onnxruntime(job: Job, scales: Scales | None, path: Path, builder: EngineBuilder, progress: Progress) -> None:
    write_engine(
        path, job.checkpoint, job.weight_format, scales, tree=job.engine_tree, max_length=job.max_length,
        draft_vocab=_draft_vocab(job), save_tokenizer=job.tokenizer.save_pretrained, source=_source(job),
        tokens=job.tokens, excluded=_excluded(job),
    )  # fmt: skip


def _check_tensorrt(job: Job) -> None:
    _ = job.gpus  # refuses what the format does not run on
    require_context(job.checkpoint.config, job.max_length)


def _write_portable(job: Job, scales: Scales | None, path: Path) -> None:
    write_portable(
        path, job.checkpoint, job.weight_format, scales, dtype=job.spec.dtype, tree=job.engine_tree, max_length=job.max_length,
        draft_vocab=_draft_vocab(job), tokens=job.tokens, excluded=_excluded(job),
    )  # fmt: skip


def _write_tensorrt(job: Job, scales: Scales | None, path: Path, builder: EngineBuilder, progress: Progress) -> None:
    write_tensorrt_engine(
        path, path.with_name("onnx"), job.checkpoint, job.weight_format, gpus=job.gpus,
        dtype=job.spec.dtype, tree=job.engine_tree, max_length=job.max_length, builder=builder, progress=progress,
        save_tokenizer=job.tokenizer.save_pretrained, source=_source(job), tokens=job.tokens,
    )  # fmt: skip


def _check_trtllm(job: Job) -> None:
    require_sizes(job.checkpoint, job.max_length, job.arguments.max_batch)


def _no_graph(job: Job, scales: Scales | None, path: Path) -> None:
    raise AssertionError(f"an engine of --engine {job.arguments.engine} is made of the checkpoint, not of a graph")


def _write_trtllm(job: Job, scales: Scales | None, path: Path, builder: EngineBuilder, progress: Progress) -> None:
    write_trtllm_engine(
        path, path.with_name("trtllm"), job.checkpoint, job.spec, tree=job.trtllm_tree, max_length=job.max_length,
        max_batch=job.arguments.max_batch, release=job.release, builder=builder, progress=progress,
        save_tokenizer=job.tokenizer.save_pretrained, source=_source(job), tokens=job.tokens,
    )  # fmt: skip


WRITERS: dict[str, EngineWriter] = {
    "onnxruntime": EngineWriter(_check_onnxruntime, lambda job, builder: None, _write_onnx, _write_onnxruntime),
    "tensorrt": EngineWriter(
        _check_tensorrt, lambda job, builder: builder.require(job.gpus), _write_portable, _write_tensorrt
    ),
    "tensorrt-llm": EngineWriter(
        _check_trtllm, lambda job, builder: builder.require(job.release), _no_graph, _write_trtllm
    ),
}


def _source(job: Job) -> dict[str, Any]:
    return {**job.arguments.base.recorded(job.base_hashes()), "quant": job.arguments.quant}


def _excluded(job: Job) -> Callable[[str], bool]:
    """Whether a linear of the graph, by its Hugging Face name, stays in float as TensorRT-LLM's does."""
    names = {
        pattern.format(layer): trtllm_linear(pattern, layer)
        for layer in range(job.checkpoint.config.num_hidden_layers)
        for pattern in TRTLLM_LINEARS
    }
    return lambda module: job.spec.is_excluded(names[module])


def _draft_vocab(job: Job) -> torch.Tensor | None:
    known, ends = job.tokens.count, job.tokens.ends
    size = min(job.arguments.draft_vocab or known, known)
    if size == job.checkpoint.config.vocab_size:
        return None
    return most_frequent_tokens(job.tokenizer, job.prompts, size=size, vocab_size=known, ends=ends)
