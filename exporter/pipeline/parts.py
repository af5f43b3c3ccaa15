"""The parts of an export, in the order in which they are written; each is made once, however often the export is interrupted."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from medusa_export.core.artifacts.resumable import ResumableOutput
from medusa_export.exporter.job.job import Job
from medusa_export.exporter.pipeline.engine_writers import WRITERS
from medusa_export.exporter.plan.hf_layout import plan_hf, require_hf
from medusa_export.exporter.plan.tensor_plan import TensorPlan
from medusa_export.exporter.plan.trtllm_compat import require_no_gaps
from medusa_export.exporter.plan.trtllm_config import trtllm_config
from medusa_export.exporter.plan.trtllm_layout import require_scales
from medusa_export.exporter.plan.trtllm_rope import require_rope
from medusa_export.exporter.verify.comparison import Comparison
from medusa_export.exporter.write.huggingface import write_hf_configs, write_shard
from medusa_export.exporter.write.ranks import rank_names, write_ranks
from medusa_export.exporter.write.shards import shards
from medusa_export.exporter.write.trtllm import write_config
from medusa_export.heads.contract.engine_tools import EngineTools, Progress
from medusa_export.quantize.ptq import calibrate
from medusa_export.quantize.scales import SCALES_FILE, Scales
from medusa_export.quantize.scales_cache import cached_scales

logger = logging.getLogger(__name__)

TREE_FILE, TOKENIZER, CONFIG, ONNX, ENGINE = "tree.json", "tokenizer", "trtllm/config.json", "onnx", "engine"
GPU_ESTIMATE = "gpu-estimate.json"
HF, HF_CONFIGS, HEADS = "hf", "hf/config.json", "heads"


@dataclass(frozen=True)
class PartWriter:
    """Writes everything of an export but the manifest.

    Attributes:
        work: the output directory that is being written.
        tools: builds, and measures trees on, engines.
        progress: called with (stage, done, total).
    """

    job: Job
    work: ResumableOutput
    tools: EngineTools
    progress: Progress

    def write(self) -> Comparison | None:
        """Write all parts.

        Returns:
            The TensorRT-LLM checkpoint's ranks compared with the source, where there is one.
        """
        scales = self._scales()
        if scales is not None:
            self.work.record("scales", scales.summary())
        return FORM_WRITERS[self.job.arguments.format].write(self, scales)

    def write_heads(self, scales: Scales | None, layout: str) -> None:
        """Write the heads alone.

        Args:
            scales: none; other forms have some.
            layout: one of :data:`~medusa_export.exporter.write.heads.LAYOUTS`.
        """
        from medusa_export.exporter.write.heads import write_heads

        logger.info("writing the heads as %s", layout)
        self.work.run_once(HEADS, lambda path: write_heads(path, self.job.checkpoint, layout))

    def write_hf(self, scales: Scales | None) -> None:
        """Write ModelOpt's unified checkpoint."""
        job = self.job
        files, found = _hf_shards(job), require_scales(job.spec, scales)
        for done, (name, plans) in enumerate(files.items()):
            self.progress("checkpoint", done, len(files))
            write = partial(write_shard, checkpoint=job.checkpoint, spec=job.spec, scales=found, plans=plans)
            self.work.run_once(f"{HF}/{name}", write)
        self.progress("checkpoint", len(files), len(files))
        self.work.run_once(HF_CONFIGS, lambda path: write_hf_configs(path.parent, job.ckpt, job.spec, files))
        job.tokenizer.save_pretrained(self.work.path / HF)

    def write_trtllm(self, scales: Scales | None) -> Comparison:
        """Write the TensorRT-LLM checkpoint and the engine; what the ranks lost against the source."""
        job, work = self.job, self.work
        if job.writes_engine and job.engine.has_graph:  # before the rest, whose tree may be measured on it
            self._write_graph_and_engine(scales)
        if job.gpu_costs:
            work.run_once(GPU_ESTIMATE, self._write_gpu_estimate)
        work.run_once(TREE_FILE, lambda path: path.write_text(job.trtllm_tree.to_json(), encoding="utf-8"))
        work.run_once(TOKENIZER, job.tokenizer.save_pretrained)
        logger.info("writing the TensorRT-LLM checkpoint, %d draft tokens", job.trtllm_tree.max_draft_len)
        work.run_once(CONFIG, lambda path: write_config(path, job.spec))
        compared = Comparison(trtllm_config(job.spec), job.checkpoint)
        write_ranks(
            work, job.checkpoint, job.spec, require_scales(job.spec, scales), compared,
            lambda done, total: self.progress("TensorRT-LLM checkpoint", done, total),
        )  # fmt: skip
        if job.writes_engine and not job.engine.has_graph:  # it is made of the checkpoint
            work.run_once(ENGINE, lambda path: self._write_engine(scales, path))
        return compared

    def _write_gpu_estimate(self, path: Path) -> None:
        body = {"predicted": self.job.gpu_prediction, **(self.job.gpu_costs or {})}
        path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")

    def _write_graph_and_engine(self, scales: Scales | None) -> None:
        logger.info("writing the ONNX graph and the engine")
        self.progress("ONNX graph", 0, 1)
        self.work.run_once(ONNX, lambda path: WRITERS[self.job.arguments.engine].write_graph(self.job, scales, path))
        self.progress("ONNX graph", 1, 1)
        self.progress("engine", 0, 1)
        self.work.run_once(ENGINE, lambda path: self._write_engine(scales, path))
        self.progress("engine", 1, 1)
        if self.job.measures_tree:
            self.job.take_trees(self.work.path / ENGINE)

    def _write_engine(self, scales: Scales | None, path: Path) -> None:
        WRITERS[self.job.arguments.engine].write_engine(self.job, scales, path, self.tools.builder, self.progress)
        if self.job.followers:
            shutil.copyfile(self.job.followers, path / self.job.followers.name)
        if self.job.measures_tree:
            logger.info("%s", self.tools.choose_tree(path, self.job.tree_prompts, self.progress))

    def _scales(self) -> Scales | None:
        job, work = self.job, self.work
        if not job.has_scales:
            return None

        def save(path: Path) -> None:
            scales = job.given_scales or cached_scales(job.calibration_key(), self._calibrate)
            logger.info("%d modules calibrated", len(scales.weight_amax))
            scales.save(path)
            work.record("scales", scales.summary())

        work.run_once(SCALES_FILE, save)
        return Scales.load(work.path / SCALES_FILE)

    def _calibrate(self) -> Scales:
        job = self.job
        return calibrate(
            job.ckpt, job.checkpoint, job.weight_format, kv_cache=job.arguments.kv_cache,
            quant_heads=job.arguments.quant_heads, batches=job.batches,
            progress=lambda done, total: self.progress("calibrate", done, total), device=job.device,
        )  # fmt: skip


def _hf_shards(job: Job) -> dict[str, list[TensorPlan]]:
    return shards(plan_hf(job.checkpoint, job.spec))


@dataclass(frozen=True)
class FormWriter:
    """What writes one form of output.

    Attributes:
        check: raises what the form cannot hold, before any work.
        parts: the parts behind the scales, in the order in which they are written.
        write: (writer, scales) writes them, and gives the ranks compared with the source where there are any.
    """

    check: Callable[[Job], None]
    parts: Callable[[Job], list[str]]
    write: Callable[[PartWriter, Scales | None], Comparison | None]


def _check_trtllm(job: Job) -> None:
    require_rope(job.checkpoint.config, job.release)
    require_no_gaps(job.trtllm_tree)
    if job.writes_engine:
        WRITERS[job.arguments.engine].check(job)


def _trtllm_parts(job: Job) -> list[str]:
    estimate = [GPU_ESTIMATE] if job.gpu_costs else []
    checkpoint = [*estimate, TREE_FILE, TOKENIZER, CONFIG, *rank_names(job.spec.tp)]
    if not job.writes_engine:
        return checkpoint
    return [ONNX, ENGINE, *checkpoint] if job.engine.has_graph else [*checkpoint, ENGINE]


def _hf_parts(job: Job) -> list[str]:
    return [*(f"{HF}/{name}" for name in _hf_shards(job)), HF_CONFIGS]


def _heads_as(layout: str) -> FormWriter:
    return FormWriter(lambda job: None, lambda job: [HEADS], partial(PartWriter.write_heads, layout=layout))


FORM_WRITERS: dict[str, FormWriter] = {
    "trtllm": FormWriter(_check_trtllm, _trtllm_parts, PartWriter.write_trtllm),
    "hf": FormWriter(lambda job: require_hf(job.spec), _hf_parts, PartWriter.write_hf),
    "vllm-heads": _heads_as("vllm"),
    "medusa-v1": _heads_as("medusa-v1"),
    "medusa-v2": _heads_as("medusa-v2"),
}


def require_writable(job: Job) -> None:
    """Raise what the job's form and engine cannot be, before any work."""
    FORM_WRITERS[job.arguments.format].check(job)


def part_names(job: Job) -> list[str]:
    """Everything that :class:`PartWriter` writes, in its order."""
    return [*([SCALES_FILE] if job.has_scales else []), *FORM_WRITERS[job.arguments.format].parts(job)]
