"""The export from end to end: write every part, check what was written, and publish it all at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medusa_export.core.artifacts.manifest import (
    check_free_space,
    has_manifest,
    is_up_to_date,
    leftovers_noted,
    output_directory,
    require_idle,
)
from medusa_export.core.artifacts.resumable import Work
from medusa_export.core.errors import ConfigError, OutputError
from medusa_export.core.text.tokenizer import Prompt
from medusa_export.exporter.engine_dirs.tensorrt import EngineBuilder
from medusa_export.exporter.job.job import ExportArguments, Job
from medusa_export.exporter.pipeline.parts import Progress, TreeChoice, part_names, write_parts
from medusa_export.exporter.verify.checkpoint import verify_trtllm
from medusa_export.exporter.verify.comparison import Comparison
from medusa_export.exporter.verify.error_table import recorded
from medusa_export.quantize.calibration_data import token_batches

logger = logging.getLogger(__name__)

CHECK_TEXTS, CHECK_TOKENS = 4, 64  # what a written engine is checked on
SMALL_MODEL = 1_000_000_000  # parameters up to which the written logits are compared with transformers

EngineCheck = Callable[[Path, Path | None, list[list[int]]], list[str]]
Notice = Callable[[str], None]


def _no_choice(engine_dir: Path, prompts: Sequence[Prompt], progress: Progress) -> str:
    raise ConfigError("--tree auto", "nothing to measure with", "a function that chooses the tree", "pass choose_tree")


class _NoBuilder:
    def require(self, target: Any) -> None:
        raise ConfigError("--engine", "nothing to build with", "a builder of engines", "pass builder")

    def build(self, source: Path, out: Path, progress: Progress, **request: Any) -> None:
        self.require(())


_NO_BUILDER = _NoBuilder()


def export(
    arguments: ExportArguments,
    check_engine: EngineCheck,
    progress: Progress = lambda stage, done, total: None,
    notice: Notice = lambda text: None,
    choose_tree: TreeChoice = _no_choice,
    builder: EngineBuilder = _NO_BUILDER,
) -> bool:
    """Write ``arguments.output``. Returns False when it was already there, made from the same inputs.

    What an interrupted run with the same inputs and arguments had finished is not made again.

    Args:
        check_engine: runs a written engine and returns its problems; gets the engine, the checkpoint to compare it with (None for
            models too large to load beside it) and some texts. Passed in, because this package does not know the engines.
        progress: called with (stage, done, total).
        notice: gets a line for the user, when an interrupted run is continued.
        choose_tree: measures the tree of a written engine, see :func:`~medusa_export.exporter.pipeline.parts.write_parts`; passed in for the
            same reason.
        builder: builds engines for GPUs; passed in for the same reason.

    Raises:
        MedusaExportError: bad input, found before any long work; nothing is left behind.
    """
    with leftovers_noted(arguments.output):
        require_idle(arguments.output)
        job = Job(arguments)
        job.check()
        if job.writes_engine:
            job.engine.require(job, builder)
    with job.inputs as inputs:
        if has_manifest(arguments.output) and is_up_to_date(arguments.output, inputs.hashes(), arguments.recorded()):
            return False
        with output_directory(
            arguments.output, inputs=inputs.marks, arguments=arguments.recorded(), hashes=inputs.hashes
        ) as work:
            check_free_space(work.path, job.estimated_bytes - sum(work.resumed.values()))
            _log_start(job, work, notice)
            compared = write_parts(job, work, progress, choose_tree, builder)
            problems = _verify(job, work, compared, check_engine, progress) if compared else []
            if problems:
                more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
                raise OutputError(
                    str(arguments.output), problems[0] + more, "a checkpoint that verifies", "report this"
                )
            logger.info("hashing what of the inputs was not read")
            inputs.hashes()
    return True


def _log_start(job: Job, work: Work, notice: Notice) -> None:
    config, checkpoint = job.checkpoint.config, job.checkpoint
    logger.info(
        "%s: %s, %d layers, %s", job.arguments.ckpt, config.family.model_type, config.num_hidden_layers, config.dtype
    )
    logger.info("%d Medusa heads (%s)", checkpoint.num_medusa_heads, checkpoint.heads.layout)
    if work.resumed:
        notice(f"continuing: {len(work.resumed)} of {len(part_names(job))} parts were finished")
        logger.info("finished by an interrupted run: %s", ", ".join(work.resumed))


def _verify(job: Job, work: Work, compared: Comparison, check_engine: EngineCheck, progress: Progress) -> list[str]:
    """Problems found in what was written; what quantization did to the weights goes into the manifest."""
    out = work.path
    progress("verify", 0, 2)
    problems = verify_trtllm(out / "trtllm", job.checkpoint, compared)
    work.record("quantization_error", recorded(compared.errors()))
    progress("verify", 1, 2)
    if not problems and (out / "engine").is_dir():
        texts = token_batches(job.tokenizer, job.prompts, max_prompts=CHECK_TEXTS, max_length=CHECK_TOKENS)
        config = job.checkpoint.config
        parameters = config.num_hidden_layers * sum(rows * width for rows, width in config.linear_shapes().values())
        problems = check_engine(out / "engine", job.arguments.ckpt if parameters < SMALL_MODEL else None, texts)
    progress("verify", 2, 2)
    return problems
