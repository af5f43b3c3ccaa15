"""The parts of an export, in the order in which they are written; each is made once, however often the export is interrupted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from medusa_export.exporter.draft_vocab import most_frequent_tokens
from medusa_export.exporter.engine_dir import write_engine, write_onnx
from medusa_export.exporter.hf import plan_hf, shards, write_hf_configs, write_shard
from medusa_export.exporter.job import HEAD_FORMS, Job
from medusa_export.exporter.plan import TensorPlan
from medusa_export.exporter.ranks import rank_names, write_ranks
from medusa_export.exporter.trtllm import require_scales, write_config
from medusa_export.heads.conversations import Prompt
from medusa_export.heads.work import Work
from medusa_export.quantize.cache import cached_scales
from medusa_export.quantize.ptq import calibrate
from medusa_export.quantize.scales import SCALES_FILE, Scales

logger = logging.getLogger(__name__)

TREE_FILE, TOKENIZER, CONFIG, ONNX, ENGINE = "tree.json", "tokenizer", "trtllm/config.json", "onnx", "engine"
HF, HF_CONFIGS, HEADS = "hf", "hf/config.json", "heads"

Progress = Callable[[str, int, int], None]
TreeChoice = Callable[[Path, Sequence[Prompt], Progress], str]


def part_names(job: Job) -> list[str]:
    """Everything that :func:`write_parts` writes, in its order."""
    scales = [SCALES_FILE] if job.has_scales else []
    if job.arguments.format == "hf":
        return [*scales, *(f"{HF}/{name}" for name in _hf_shards(job)), HF_CONFIGS]
    if job.arguments.format in HEAD_FORMS:
        return [HEADS]
    engine = [ONNX, ENGINE] if job.writes_engine else []
    return [*scales, *engine, TREE_FILE, TOKENIZER, CONFIG, *rank_names(job.spec.tp)]


def write_parts(job: Job, inputs: Mapping[str, str], work: Work, progress: Progress, choose_tree: TreeChoice) -> None:
    """Everything of an export but the manifest.

    Args:
        inputs: file -> SHA-256 of the job's input files.
        progress: called with (stage, done, total).
        choose_tree: leaves tree.json and acceptance.json in an engine's directory, and says why.
    """
    scales = _scales(job, inputs, work, progress)
    if scales is not None:
        work.record("scales", scales.summary())
    if job.arguments.format == "trtllm":
        _write_trtllm(job, scales, work, progress, choose_tree)
    elif job.arguments.format == "hf":
        _write_hf(job, scales, work, progress)
    else:
        _write_heads(job, work)


def _write_heads(job: Job, work: Work) -> None:
    from medusa_export.exporter.head_writer import write_heads

    layout = HEAD_FORMS[job.arguments.format]
    logger.info("writing the heads as %s", layout)
    work.once(HEADS, lambda path: write_heads(path, job.checkpoint, layout))


def _hf_shards(job: Job) -> dict[str, list[TensorPlan]]:
    return shards(plan_hf(job.checkpoint, job.spec))


def _write_hf(job: Job, scales: Scales | None, work: Work, progress: Progress) -> None:
    files, found = _hf_shards(job), require_scales(job.spec, scales)
    for done, (name, plans) in enumerate(files.items()):
        progress("checkpoint", done, len(files))
        work.once(f"{HF}/{name}", lambda path, plans=plans: write_shard(path, job.checkpoint, job.spec, found, plans))
    progress("checkpoint", len(files), len(files))
    work.once(HF_CONFIGS, lambda path: write_hf_configs(path.parent, job.arguments.ckpt, job.spec, files))
    job.tokenizer.save_pretrained(work.path / HF)


def _write_trtllm(job: Job, scales: Scales | None, work: Work, progress: Progress, choose_tree: TreeChoice) -> None:
    if job.writes_engine:  # before the rest, whose tree may be measured on it
        _write_graphs(job, scales, work, progress, choose_tree)
    work.once(TREE_FILE, lambda path: path.write_text(job.trtllm_tree.to_json(), encoding="utf-8"))
    work.once(TOKENIZER, job.tokenizer.save_pretrained)
    logger.info("writing the TensorRT-LLM checkpoint, %d draft tokens", job.trtllm_tree.max_draft_len)
    work.once(CONFIG, lambda path: write_config(path, job.spec))
    write_ranks(
        work, job.checkpoint, job.spec, require_scales(job.spec, scales),
        lambda done, total: progress("TensorRT-LLM checkpoint", done, total),
    )  # fmt: skip


def _write_graphs(job: Job, scales: Scales | None, work: Work, progress: Progress, choose_tree: TreeChoice) -> None:
    def write_whole_engine(path: Path) -> None:
        _write_engine(job, scales, path)
        if job.measures_tree:
            logger.info("%s", choose_tree(path, job.tree_prompts, progress))

    logger.info("writing the ONNX graph and the engine")
    for stage, name, write in (
        ("ONNX graph", ONNX, partial(_write_onnx, job, scales)),
        ("engine", ENGINE, write_whole_engine),
    ):
        progress(stage, 0, 1)
        work.once(name, write)
        progress(stage, 1, 1)
    if job.measures_tree:
        job.take_trees(work.path / ENGINE)


def _scales(job: Job, inputs: Mapping[str, str], work: Work, progress: Progress) -> Scales | None:
    if not job.has_scales:
        return None

    def save(path: Path) -> None:
        scales = job.given_scales or cached_scales(job.calibration_key(inputs), lambda: _calibrate(job, progress))
        logger.info("%d modules calibrated", len(scales.weight_amax))
        scales.save(path)
        work.record("scales", scales.summary())

    work.once(SCALES_FILE, save)
    return Scales.load(work.path / SCALES_FILE)


def _calibrate(job: Job, progress: Progress) -> Scales:
    return calibrate(
        job.arguments.ckpt, job.checkpoint, job.fmt, kv_cache=job.arguments.kv_cache,
        quant_heads=job.arguments.quant_heads, batches=job.batches,
        progress=lambda done, total: progress("calibrate", done, total), device=job.device,
    )  # fmt: skip


def _write_onnx(job: Job, scales: Scales | None, path: Path) -> None:
    write_onnx(path, job.checkpoint, job.fmt, scales, max_length=job.max_length, excluded=_excluded(job))


def _write_engine(job: Job, scales: Scales | None, path: Path) -> None:
    source: dict[str, Any] = {"checkpoint": str(job.arguments.ckpt), "quant": job.arguments.quant}
    write_engine(
        path, job.checkpoint, job.fmt, scales, tree=job.engine_tree, max_length=job.max_length,
        draft_vocab=_draft_vocab(job), save_tokenizer=job.tokenizer.save_pretrained, source=source,
        excluded=_excluded(job),
    )  # fmt: skip


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
