"""medusa-run: measure an engine, prove that its outputs are equal, write the report."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from medusa_export.core.errors import OutputError
from medusa_export.exporter.cli.console import Verbose, command_app, main, progress_bars, stdout

run_app = command_app()


@run_app.command()
def run_command(
    engine: Annotated[Path, typer.Option(help="The engine directory of an export.")],
    prompts: Annotated[Path, typer.Option(help="JSONL with turns, messages or prompt.")],
    report: Annotated[Path | None, typer.Option(help="Write the report here as JSON.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="The original checkpoint, to compare the engine's numbers with.")
    ] = None,
    tree: Annotated[str | None, typer.Option(help="Another tree: a JSON file or a preset.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many prompts.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens generated for a prompt, at most.")] = 128,
    repeats: Annotated[int, typer.Option(help="Interleaved runs of every prompt.")] = 3,
    min_speedup: Annotated[float | None, typer.Option(help="Exit with 1 when the speed-up is below this.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 takes one a core.")] = 0,
    seed: Annotated[int, typer.Option(help="Order of the prompts and bootstrap of the interval.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write the report here as one self-contained page.")] = None,
    temperature: Annotated[
        float, typer.Option(help="Draw tokens at it, with the same random numbers in both modes; 0: decode greedily.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="With --temperature: draw from the smallest set of tokens with this probability.")
    ] = 1.0,
    typical: Annotated[
        bool, typer.Option("--typical", help="With --temperature: the Medusa paper's typical acceptance. Not lossless.")
    ] = False,
    compare: Annotated[
        Path | None,
        typer.Option(help="Another engine of the same model, run in between: tokens, distributions, speed."),
    ] = None,
    sweep_batch: Annotated[
        list[int] | None, typer.Option(help="Also run so many prompts at once, without and with the tree; repeat it.")
    ] = None,
    sweep_length: Annotated[
        list[int] | None, typer.Option(help="Also run behind prompts of so many tokens; repeat it.")
    ] = None,
    save_outputs: Annotated[
        Path | None, typer.Option(help="Write every prompt's outputs and times here, JSONL.")
    ] = None,
    trtllm_api: Annotated[
        str, typer.Option(help="TensorRT-LLM engines: runner (ModelRunnerCpp) or llm (the LLM API, 0.20 and later).")
    ] = "runner",
    timeout: Annotated[float, typer.Option(help="TensorRT-LLM engines: seconds to wait for a step.")] = 600.0,
    verbose: Verbose = False,
) -> None:
    """Run an engine without and with Medusa on the same prompts; measure the speed-up and prove that outputs are equal.

    Exit code 1: an output differs by more than numerical noise, or --min-speedup is missed.
    """
    from medusa_export.engines.bench.run import RunArguments, run

    given = {**locals(), "sweep_batch": tuple(sweep_batch or ()), "sweep_length": tuple(sweep_length or ())}
    for path in (report, html, save_outputs):
        if path is not None and not path.resolve().parent.is_dir():
            raise OutputError(str(path), "no such directory", "an existing one", "create it first")
    with progress_bars() as progress:
        result = run(RunArguments(**{item.name: given[item.name] for item in fields(RunArguments)}), progress)
    result["command"] = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    _print_report(result)
    if html is not None:
        from medusa_export.engines.bench.html_report import render

        html.write_text(render(result), encoding="utf-8")
    if report is not None:
        report.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if result["failures"]:
        raise typer.Exit(1)


def _print_report(result: dict[str, Any]) -> None:
    from medusa_export.engines.bench.report import print_report

    print_report(result, stdout)


def run_main() -> None:
    """Entry point of medusa-run."""
    main(run_app)
