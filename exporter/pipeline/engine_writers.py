"""What --engine may name, in one table: which graph and engine are written, with which tree, and what is refused beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.engine_dirs.onnxruntime import onnx_form, write_engine, write_onnx
from medusa_export.exporter.engine_dirs.tensorrt import EngineBuilder, write_portable, write_tensorrt_engine
from medusa_export.exporter.engine_dirs.trtllm import require_sizes, write_trtllm_engine
from medusa_export.exporter.job.draft_vocab import most_frequent_tokens
from medusa_export.exporter.onnx.decoder import require_context, require_supported
from medusa_export.quantize.scales import Scales

if TYPE_CHECKING:
    from medusa_export.exporter.job.job import Job

GPU_TREE, CPU_TREE = "medusa-63", "cpu-3"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EngineKind:
    """A kind of engine.

    Attributes:
        description: for --help.
        tree: the preset that it gets when none is asked for.
        check: raises what cannot be built, before any work.
        require: (job, builder) raises what the builder cannot do on this machine, before any work.
        write_graph: (job, scales, path) writes ``onnx/``; None for an engine that is made of the TensorRT-LLM checkpoint.
        write_engine: (job, scales, path, builder, progress) writes ``engine/``, after what it is made of.
        runs_here: whether the engine runs where it is made, so that trees can be measured on it.
    """

    description: str
    tree: str
    check: Callable[[Job], None]
    require: Callable[[Job, EngineBuilder], None]
    write_graph: Callable[[Job, Scales | None, Path], None] | None
    write_engine: Callable[[Job, Scales | None, Path, EngineBuilder, Progress], None]
    runs_here: bool


def _check_onnxruntime(job: Job) -> None:
    onnx_form(job.fmt)
    require_supported(job.checkpoint.config, job.max_length)


def _write_onnx(job: Job, scales: Scales | None, path: Path) -> None:
    write_onnx(path, job.checkpoint, job.fmt, scales, max_length=job.max_length, excluded=_excluded(job))


def _write_engine(job: Job, scales: Scales | None, path: Path, builder: EngineBuilder, progress: Progress) -> None:
    write_engine(
        path, job.checkpoint, job.fmt, scales, tree=job.engine_tree, max_length=job.max_length,
        draft_vocab=_draft_vocab(job), save_tokenizer=job.tokenizer.save_pretrained, source=_source(job),
        excluded=_excluded(job),
    )  # fmt: skip


def _check_tensorrt(job: Job) -> None:
    _ = job.gpus  # refuses what the format does not run on
    require_context(job.checkpoint.config, job.max_length)


def _write_portable(job: Job, scales: Scales | None, path: Path) -> None:
    write_portable(
        path, job.checkpoint, job.fmt, scales, dtype=job.spec.dtype, tree=job.engine_tree, max_length=job.max_length,
        draft_vocab=_draft_vocab(job), excluded=_excluded(job),
    )  # fmt: skip


def _write_tensorrt(job: Job, scales: Scales | None, path: Path, builder: EngineBuilder, progress: Progress) -> None:
    write_tensorrt_engine(
        path, path.with_name("onnx"), job.checkpoint, job.fmt, gpus=job.gpus,
        dtype=job.spec.dtype, tree=job.engine_tree, max_length=job.max_length, builder=builder, progress=progress,
        save_tokenizer=job.tokenizer.save_pretrained, source=_source(job),
    )  # fmt: skip


def _check_trtllm(job: Job) -> None:
    require_sizes(job.checkpoint, job.max_length, job.arguments.max_batch)


def _write_trtllm(job: Job, scales: Scales | None, path: Path, builder: EngineBuilder, progress: Progress) -> None:
    write_trtllm_engine(
        path, path.with_name("trtllm"), job.checkpoint, job.spec, tree=job.trtllm_tree, max_length=job.max_length,
        max_batch=job.arguments.max_batch, release=job.release, builder=builder, progress=progress,
        save_tokenizer=job.tokenizer.save_pretrained, source=_source(job),
    )  # fmt: skip


ENGINES: dict[str, EngineKind] = {
    "onnxruntime": EngineKind(
        "ONNX Runtime on a CPU", CPU_TREE, _check_onnxruntime, lambda job, builder: None, _write_onnx, _write_engine,
        runs_here=True,
    ),
    "tensorrt": EngineKind(
        "TensorRT for the GPUs of --gpu", GPU_TREE, _check_tensorrt, lambda job, builder: builder.require(job.gpus),
        _write_portable, _write_tensorrt, runs_here=False,
    ),
    "tensorrt-llm": EngineKind(
        "TensorRT-LLM, built by trtllm-build where that is installed", GPU_TREE, _check_trtllm,
        lambda job, builder: builder.require(job.release), None, _write_trtllm, runs_here=False,
    ),
}  # fmt: skip
NO_ENGINE = "none"


def engine_kind(name: str) -> EngineKind | None:
    """The kind of that name, None for "none".

    Raises:
        ConfigError: an unknown name.
    """
    if name not in (*ENGINES, NO_ENGINE):
        raise ConfigError("--engine", repr(name), f"{', '.join(ENGINES)} or {NO_ENGINE}", "pick one of them")
    return ENGINES.get(name)


def _source(job: Job) -> dict[str, Any]:
    return {"checkpoint": str(job.arguments.ckpt), "quant": job.arguments.quant}


def _excluded(job: Job) -> Callable[[str], bool]:
    """Whether a linear of the graph, by its Hugging Face name, stays in float as TensorRT-LLM's does."""
    names = {
        "q_proj": "attention.qkv",
        "k_proj": "attention.qkv",
        "v_proj": "attention.qkv",
        "o_proj": "attention.dense",
    }
    names |= {"gate_proj": "mlp.fc", "up_proj": "mlp.gate", "down_proj": "mlp.proj"}

    def excluded(module: str) -> bool:
        parts = module.split(".")  # model.layers.{layer}.{block}.{linear}
        return job.spec.is_excluded(f"transformer.layers.{parts[2]}.{names[parts[4]]}")

    return excluded


def _draft_vocab(job: Job) -> torch.Tensor | None:
    size, vocab_size = job.arguments.draft_vocab, job.checkpoint.config.vocab_size
    if not 0 < size < vocab_size:
        return None
    return most_frequent_tokens(job.tokenizer, job.prompts, size=size, vocab_size=vocab_size)
