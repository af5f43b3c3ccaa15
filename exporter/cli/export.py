"""medusa-export, with plan, verify and formats: parse, call one function, print."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from medusa_export.core.artifacts.output_file import require_output_file, write_output
from medusa_export.core.flags import NUMBER, flag
from medusa_export.exporter.cli.console import command_app, main, progress_bars, stderr, stdout
from medusa_export.exporter.cli.flags.commands import callback, command
from medusa_export.exporter.cli.gpu_cost import expected_line
from medusa_export.exporter.job.arguments import OUTPUT, ExportArguments

export_app = command_app()


@dataclass(frozen=True)
class Rehearsal:
    """What medusa-export takes besides the flags of the export itself."""

    dry_run: bool = flag(False, help="Print what the export would take, as plan does, and write nothing.", panel=OUTPUT)


@dataclass(frozen=True)
class PlanFlags:
    """What medusa-export plan takes besides the flags of the export."""

    batch: int = flag(1, help="Sequences that run at once on the GPU.", panel="Plan", bounds=NUMBER)
    context: int | None = flag(
        None,
        help="Tokens of each sequence, prompt and output.",
        panel="Plan",
        default="the model's, up to 4096",
        bounds=NUMBER,
    )
    json_file: Path | None = flag(None, help="Write the figures to this file as JSON.", panel="Plan", name="--json")


@dataclass(frozen=True)
class VerifyFlags:
    """What medusa-export verify takes."""

    out: Path = flag(
        help="A directory that medusa-export wrote, or any TensorRT-LLM Medusa checkpoint.",
        panel="Input",
        positional=True,
    )
    ckpt: Path | None = flag(
        None,
        help="What it was made from: a Hugging Face directory, or owner/name[@revision] on the hub.",
        panel="Source",
        default="what the manifest records, where it is still the same",
    )
    heads: Path | None = flag(
        None, help="Medusa heads, when they are not inside CKPT: a path, or owner/name[@revision].", panel="Source"
    )
    require_source: bool = flag(False, help="Fail where there is no source to compare with.", panel="Source")
    quick: bool = flag(False, help="Do not run the engine.", panel="Source")


@callback(export_app)
def export_command(arguments: ExportArguments, rehearsal: Rehearsal) -> None:
    """Turn a Hugging Face checkpoint with Medusa heads into a TensorRT-LLM checkpoint, an ONNX graph and an engine.

    Example: medusa-export --ckpt model --heads heads --quant fp8 --output out
    """
    if rehearsal.dry_run:
        from medusa_export.core.artifacts.manifest import check_free_space

        sizing = _print_plan(arguments)
        check_free_space(arguments.output, sizing.disk_reserve)
        return
    from medusa_export.engines.backends import engine_builder
    from medusa_export.engines.trtllm.build import next_steps
    from medusa_export.engines.tuning.auto import choose_tree
    from medusa_export.engines.verify.selfcheck import check_engine
    from medusa_export.exporter.pipeline.export import export
    from medusa_export.heads.contract.engine_tools import EngineTools

    builder = engine_builder(arguments.engine)
    with progress_bars() as progress:
        say = partial(stderr.print, soft_wrap=True)
        written = export(arguments, EngineTools(check_engine, choose_tree, builder), progress, say)
    stdout.print(f"{'wrote' if written else 'up to date:'} {arguments.output}", soft_wrap=True)
    expected = expected_line(arguments.output)
    for line in [*([expected] if expected else ()), *next_steps(arguments.output)]:
        stdout.print(line, soft_wrap=True)


def _print_plan(arguments: ExportArguments, **options: Any) -> Any:
    from medusa_export.exporter.sizing.estimate import plan_export
    from medusa_export.exporter.sizing.report import print_sizing

    sizing = plan_export(arguments, **options)
    print_sizing(sizing, stdout)
    return sizing


@command(export_app, "plan")
def plan_command(arguments: ExportArguments, own: PlanFlags) -> None:
    """Print what an export would take: files, disk, RAM, and which GPUs run its engine. Reads headers, writes nothing.

    Example: medusa-export plan --ckpt model --heads heads --quant fp8 --tp 2 --batch 8
    """
    require_output_file(own.json_file)
    sizing = _print_plan(arguments, batch=own.batch, context=own.context)
    if own.json_file is not None:
        write_output(own.json_file, json.dumps(asdict(sizing), indent=1) + "\n")


@command(export_app, "verify")
def verify_command(own: VerifyFlags) -> None:
    """Check an export again: every number against its source, every file against the others, the engine by running it.

    Exit code 1 when something is wrong.

    Example: medusa-export verify out
    """
    from medusa_export.exporter.cli.verify import verify_directory

    verify_directory(own.out, ckpt=own.ckpt, heads=own.heads, require_source=own.require_source, quick=own.quick)


@command(export_app, "formats")
def formats_command() -> None:
    """List the weight and key/value-cache formats: bits, GPUs, whether they need prompts, and what this machine can do.

    Example: medusa-export formats
    """
    from medusa_export.exporter.doctor.machine import look
    from medusa_export.exporter.doctor.packages import find_packages
    from medusa_export.exporter.doctor.report import print_formats

    print_formats(find_packages(imports=False), [gpu.sm for gpu in look().gpus], stdout)


def export_main() -> None:
    """Entry point of medusa-export."""
    main(export_app)
