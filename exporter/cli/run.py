"""medusa-run: measure an engine, prove that its outputs are equal, write the report."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from medusa_export.core.artifacts.output_file import require_output_file, write_output
from medusa_export.core.flags import flag, requirement_error
from medusa_export.core.hub import find_model
from medusa_export.engines.bench.arguments import RunArguments
from medusa_export.exporter.cli.console import command_app, main, progress_bars, stdout, stop_on_request
from medusa_export.exporter.cli.flags.commands import callback, command

run_app = command_app()


@dataclass(frozen=True)
class ReportFlags:
    """Where the report goes."""

    report: Path | None = flag(None, help="Write the report to this file as JSON.", panel="Output")
    html: Path | None = flag(None, help="Write the report to this file as one self-contained page.", panel="Output")


@callback(run_app)
def run_command(arguments: RunArguments, files: ReportFlags) -> None:
    """Run an engine without and with Medusa on the same prompts; measure the speed-up and prove that outputs are equal.

    Ctrl-C ends it after the prompt that is running, and reports what it has finished; exit code 130.

    Exit code 1: an output differs by more than numerical noise, drafts are accepted less often than acceptance.json predicts,
    a check finds something, or --min-speedup is missed.

    Example: medusa-run --engine out/engine --prompts chats.jsonl --report report.json --html report.html
    """
    from medusa_export.engines.bench.report import print_report
    from medusa_export.engines.bench.run import MEASURED, run
    from medusa_export.heads.checkpoint.decoder_config import DecoderConfig

    for path in (files.report, files.html, arguments.save_outputs):
        require_output_file(path)
    if arguments.reference is not None:
        reference = find_model(arguments.reference, revision=arguments.revision, check=DecoderConfig.from_dir)
        DecoderConfig.from_dir(reference.path)
        arguments = replace(arguments, reference=reference.path)
    elif arguments.revision is not None:
        raise requirement_error("--revision", arguments.revision, "--reference")
    with progress_bars() as show, stop_on_request() as request:

        def progress(stage: str, *at: Any) -> None:
            request.is_armed = stage == MEASURED
            show(stage, *at)

        result = run(arguments, progress, lambda: request.came)
    result["command"] = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    _write_report(result, files)  # before it is printed: a pipe that closes must not cost the run
    print_report(result, stdout)
    if result["stopped"]:
        raise typer.Exit(128 + signal.SIGINT)
    if result["failures"]:
        raise typer.Exit(1)


@dataclass(frozen=True)
class DiffFlags:
    """What medusa-run diff takes."""

    first: Path = flag(help="Report of medusa-run --report, A.", panel="Input", positional=True)
    second: Path = flag(help="Another one, B.", panel="Input", positional=True)


@command(run_app, "diff")
def diff_command(own: DiffFlags) -> None:
    """Compare two reports: how much faster one is than the other on the prompts that both have.

    Example: medusa-run diff before.json after.json
    """
    from medusa_export.engines.bench.diff import print_diff, read_report

    print_diff(read_report(own.first), read_report(own.second), stdout)


def _write_report(result: dict[str, Any], files: ReportFlags) -> None:
    """What takes no rendering comes first."""
    if files.report is not None:
        write_output(files.report, json.dumps(result, indent=1) + "\n")
    if files.html is not None:
        from medusa_export.engines.bench.html_report import render

        write_output(files.html, render(result))


def run_main() -> None:
    """Entry point of medusa-run."""
    main(run_app)
