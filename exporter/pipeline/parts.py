"""The parts of an export, in the order in which they are written; each is made once, however often the export is interrupted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from medusa_export.core.artifacts.resumable import Work
from medusa_export.core.text.tokenizer import Prompt
from medusa_export.exporter.engine_dirs.tensorrt import EngineBuilder
from medusa_export.exporter.job.job import HEAD_FORMS, Job
from medusa_export.exporter.plan.trtllm_config import trtllm_config
from medusa_export.exporter.plan.trtllm_layout import TensorPlan
from medusa_export.exporter.verify.comparison import Comparison
from medusa_export.exporter.write.huggingface import plan_hf, write_hf_configs, write_shard
from medusa_export.exporter.write.ranks import rank_names, write_ranks
from medusa_export.exporter.write.shards import shards
from medusa_export.exporter.write.trtllm import require_scales, write_config
from medusa_export.quantize.ptq import calibrate
from medusa_export.quantize.scales import SCALES_FILE, Scales
from medusa_export.quantize.scales_cache import cached_scales

logger = logging.getLogger(__name__)

TREE_FILE, TOKENIZER, CONFIG, ONNX, ENGINE = "tree.json", "tokenizer", "trtllm/config.json", "onnx", "engine"
HF, HF_CONFIGS, HEADS = "hf", "hf/config.json", "heads"

Progress = Callable[[str, int, int], None]
TreeChoice = Callable[[Path, Sequence[Prompt], Progress], str]
GraphWriter = Callable[[Job, Scales | None, Path], None]


def part_names(job: Job) -> list[str]:
    """Everything that :func:`write_parts` writes, in its order."""
    scales = [SCALES_FILE] if job.has_scales else []
    if job.arguments.format == "hf":
        return [*scales, *(f"{HF}/{name}" for name in _hf_shards(job)), HF_CONFIGS]
    if job.arguments.format in HEAD_FORMS:
        return [HEADS]
    checkpoint = [TREE_FILE, TOKENIZER, CONFIG, *rank_names(job.spec.tp)]
    if not job.writes_engine:
        return [*scales, *checkpoint]
    return [*scales, *([ONNX, ENGINE, *checkpoint] if job.engine.write_graph else [*checkpoint, ENGINE])]


def write_parts(
    job: Job, work: Work, progress: Progress, choose_tree: TreeChoice, builder: EngineBuilder
) -> Comparison | None:
    """Everything of an export but the manifest.

    Args:
        progress: called with (stage, done, total).
        choose_tree: leaves tree.json and acceptance.json in an engine's directory, and says why.
        builder: builds engines for GPUs.

    Returns:
        The TensorRT-LLM checkpoint's ranks compared with the source, where there is one.
    """
    scales = _scales(job, work, progress)
    if scales is not None:
        work.record("scales", scales.summary())
    if job.arguments.format == "trtllm":
        return _write_trtllm(job, scales, work, progress, choose_tree, builder)
    if job.arguments.format == "hf":
        _write_hf(job, scales, work, progress)
    else:
        _write_heads(job, work)
    return None


def _write_heads(job: Job, work: Work) -> None:
    from medusa_export.exporter.write.heads import write_heads

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


def _write_trtllm(
    job: Job, scales: Scales | None, work: Work, progress: Progress, choose_tree: TreeChoice, builder: EngineBuilder
) -> Comparison:
    if job.writes_engine and job.engine.write_graph:  # before the rest, whose tree may be measured on it
        _write_graphs(job, job.engine.write_graph, scales, work, progress, choose_tree, builder)
    work.once(TREE_FILE, lambda path: path.write_text(job.trtllm_tree.to_json(), encoding="utf-8"))
    work.once(TOKENIZER, job.tokenizer.save_pretrained)
    logger.info("writing the TensorRT-LLM checkpoint, %d draft tokens", job.trtllm_tree.max_draft_len)
    work.once(CONFIG, lambda path: write_config(path, job.spec))
    compared = Comparison(trtllm_config(job.spec), job.checkpoint)
    write_ranks(
        work, job.checkpoint, job.spec, require_scales(job.spec, scales), compared,
        lambda done, total: progress("TensorRT-LLM checkpoint", done, total),
    )  # fmt: skip
    if job.writes_engine and not job.engine.write_graph:  # it is made of the checkpoint
        work.once(ENGINE, lambda path: job.engine.write_engine(job, scales, path, builder, progress))
    return compared


def _write_graphs(
    job: Job, graph: GraphWriter, scales: Scales | None, work: Work, progress: Progress, choose_tree: TreeChoice,
    builder: EngineBuilder,
) -> None:  # fmt: skip
    kind = job.engine

    def write_graph(path: Path) -> None:
        graph(job, scales, path)

    def write_engine(path: Path) -> None:
        kind.write_engine(job, scales, path, builder, progress)
        if job.measures_tree:
            logger.info("%s", choose_tree(path, job.tree_prompts, progress))

    logger.info("writing the ONNX graph and the engine")
    for stage, name, write in (("ONNX graph", ONNX, write_graph), ("engine", ENGINE, write_engine)):
        progress(stage, 0, 1)
        work.once(name, write)
        progress(stage, 1, 1)
    if job.measures_tree:
        job.take_trees(work.path / ENGINE)


def _scales(job: Job, work: Work, progress: Progress) -> Scales | None:
    if not job.has_scales:
        return None

    def save(path: Path) -> None:
        scales = job.given_scales or cached_scales(job.calibration_key(), lambda: _calibrate(job, progress))
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
