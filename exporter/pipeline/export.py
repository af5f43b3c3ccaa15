"""The export from end to end: write every part, check what was written, and publish it all at once."""

from __future__ import annotations

import logging
from collections.abc import Callable

from medusa_export.core.artifacts.manifest import (
    check_free_space,
    has_manifest,
    is_up_to_date,
    output_directory,
)
from medusa_export.core.artifacts.resumable import ResumableOutput
from medusa_export.core.artifacts.staging import leftovers_noted, require_idle
from medusa_export.core.errors import InternalError, MedusaExportError, OutputError
from medusa_export.core.text.model_tokens import describe_tokens
from medusa_export.exporter.job.arguments import SMALL_MODEL, ExportArguments
from medusa_export.exporter.job.job import Job
from medusa_export.exporter.pipeline.engine_writers import WRITERS
from medusa_export.exporter.pipeline.parts import PartWriter, part_names, require_writable
from medusa_export.exporter.verify.checkpoint import verify_trtllm
from medusa_export.exporter.verify.comparison import Comparison
from medusa_export.exporter.verify.error_table import recorded
from medusa_export.heads.contract.engine_tools import EngineTools, Progress
from medusa_export.quantize.calibration_data import token_batches

logger = logging.getLogger(__name__)

CHECK_TEXTS, CHECK_TOKENS = 4, 64  # what a written engine is checked on

Notice = Callable[[str], None]


def export(
    arguments: ExportArguments,
    tools: EngineTools,
    progress: Progress = lambda stage, done, total: None,
    notice: Notice = lambda text: None,
) -> bool:
    """Write ``arguments.output``. Returns False when it was already there, made from the same inputs.

    What an interrupted run with the same inputs and arguments had finished is not made again.

    Args:
        tools: the engines' part: builds them, checks them, measures trees on them.
        progress: called with (stage, done, total).
        notice: gets lines for the user: that an interrupted run is continued, and what ends the answers of the model.

    Raises:
        MedusaExportError: bad input, found before any long work; nothing is left behind.
    """
    with leftovers_noted(arguments.output):
        require_idle(arguments.output)
        job = Job(arguments)
        job.check()
        require_writable(job)
        if job.writes_engine:
            WRITERS[arguments.engine].require(job, tools.builder)
    with job.inputs as inputs:
        if has_manifest(arguments.output) and is_up_to_date(arguments.output, job.input_hashes(), arguments.recorded()):
            return False
        with output_directory(
            arguments.output, inputs=inputs.marks, arguments=arguments.recorded(), hashes=job.input_hashes
        ) as work:
            check_free_space(work.path, job.estimated_bytes - sum(work.resumed.values()))
            _log_start(job, work, notice)
            compared = PartWriter(job, work, tools, progress).write()
            work.record("sources", _sources(job))
            wrong = _verify(job, work, compared, progress) if compared else []
            lost = _run_engine(job, work, tools, progress) if compared and not wrong else []
            logger.info("hashing the inputs that were not read")
            inputs.hashes()  # before what was found wrong is said: it may be that one of them changed
            if wrong or lost:
                raise _refusal(job, wrong, lost)
    notice(_where_answers_end(job))
    return True


def _refusal(job: Job, wrong: list[str], lost: list[str]) -> MedusaExportError:
    """Why an output is not published.

    Args:
        wrong: of the numbers in the files, which is this project's fault.
        lost: of what the engine says. Its numbers are right, so where the format rounds it is what that costs this model.
    """
    problems = wrong or lost
    more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
    where, got = str(job.arguments.output), problems[0] + more
    if wrong or not job.weight_format.is_quantized:
        return InternalError(where, got, "an export that verifies")
    action = "take another --quant, or --calib with text of the model's own kind"
    return OutputError(where, got, f"a model that stands --quant {job.arguments.quant}", action)


def _sources(job: Job) -> dict[str, dict[str, str]]:
    """What base model and heads were called, and the hub's commit where they come from there; their hashes are the inputs'."""
    given = {"ckpt": job.arguments.base, "heads": job.arguments.own_heads}
    return {
        name: {"name": files.name} | ({"commit": files.commit} if files.commit else {})
        for name, files in given.items()
        if files is not None
    }


def _where_answers_end(job: Job) -> str:
    if not job.tokens.ends:
        places = "config.json, generation_config.json, the tokenizer and its chat template"
        return f"warning: {places} name no end-of-sequence token; answers go on to their limit"
    plural = "s" if len(job.tokens.ends) > 1 else ""
    return f"end-of-sequence token{plural}: {describe_tokens(job.tokenizer, job.tokens.ends)}"


def _log_start(job: Job, work: ResumableOutput, notice: Notice) -> None:
    config, checkpoint = job.checkpoint.config, job.checkpoint
    logger.info(
        "%s: %s, %d layers, %s",
        job.arguments.base.name,
        config.family.model_type,
        config.num_hidden_layers,
        config.dtype,
    )
    logger.info("%d Medusa heads (%s)", checkpoint.num_medusa_heads, checkpoint.heads.layout)
    if work.resumed:
        notice(f"continuing: {len(work.resumed)} of {len(part_names(job))} parts were finished")
        logger.info("finished by an interrupted run: %s", ", ".join(work.resumed))


def _verify(job: Job, work: ResumableOutput, compared: Comparison, progress: Progress) -> list[str]:
    """Problems found in what was written; what quantization did to the weights goes into the manifest."""
    progress("verify", 0, 2)
    problems = verify_trtllm(work.path / "trtllm", job.checkpoint, compared)
    work.record("quantization_error", recorded(compared.errors()))
    progress("verify", 1, 2)
    return problems


def _run_engine(job: Job, work: ResumableOutput, tools: EngineTools, progress: Progress) -> list[str]:
    """Problems of the engine when it runs, if there is one that runs here."""
    problems, engine = list[str](), work.path / "engine"
    if engine.is_dir():
        texts = token_batches(job.tokenizer, job.prompts, max_prompts=CHECK_TEXTS, max_length=CHECK_TOKENS)
        config = job.checkpoint.config
        parameters = config.num_hidden_layers * sum(rows * width for rows, width in config.linear_shapes().values())
        problems = tools.check(engine, job.ckpt if parameters < SMALL_MODEL else None, texts)
    progress("verify", 2, 2)
    return problems
