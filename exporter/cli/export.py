"""medusa-export and medusa-run: parse, call one function, print. Like the other cli files, it may import across."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from medusa_export.core.errors import ConfigError, OutputError
from medusa_export.exporter.cli.console import Verbose, command_app, main, progress_bars, stderr, stdout
from medusa_export.exporter.cli.gpu_cost import expected_line
from medusa_export.heads.roofline.gpus import BY_KEY
from medusa_export.heads.trees.tree import PRESETS
from medusa_export.quantize.formats import FORMATS, KV_CACHE, group_sizes
from medusa_export.quantize.tensorrt_targets import TARGETS, named

export_app = command_app()


def _table(rows: dict[str, Any]) -> str:
    """Names and descriptions for --help."""
    return "; ".join(f"[bold]{name}[/] {row.description}" for name, row in rows.items())


@export_app.callback(invoke_without_command=True)
def export_command(
    context: typer.Context,
    ckpt: Annotated[Path | None, typer.Option(help="Hugging Face directory of the base model.")] = None,
    quant: Annotated[str, typer.Option(help=f"Weights: {_table(FORMATS)}.")] = "none",
    output: Annotated[Path | None, typer.Option(help="Directory to write. Default: CKPT-QUANT beside CKPT.")] = None,
    heads: Annotated[Path | None, typer.Option(help="Medusa heads, when they are not inside CKPT.")] = None,
    kv_cache: Annotated[str, typer.Option(help=f"Key/value cache: {_table(KV_CACHE)}.")] = "none",
    quant_heads: Annotated[bool, typer.Option(help="Quantize the heads too (default: 16 bit).")] = False,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16, or auto: the checkpoint's own.")] = "auto",
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks.")] = 1,
    tree: Annotated[
        str | None,
        typer.Option(
            help=f"Medusa tree: a JSON file, one of {', '.join(PRESETS)}, or auto: measured on the written engine. Default: auto "
            "with --prompts, else medusa-63 for TensorRT-LLM and cpu-3 for ONNX Runtime."
        ),
    ] = None,
    calib: Annotated[
        Path | None, typer.Option(help="Calibration prompts, JSONL with messages, turns or prompt. Default: built in.")
    ] = None,
    calib_prompts: Annotated[int, typer.Option(help="How many of them calibrate.")] = 32,
    engine: Annotated[
        str,
        typer.Option(
            help="onnxruntime; tensorrt, see --gpu; tensorrt-llm, built here or by the build.sh that it writes; or none."
        ),
    ] = "onnxruntime",
    gpu: Annotated[
        str | None,
        typer.Option(
            help=f"GPUs that the TensorRT engine is for, such as sm89,sm120: of {named(TARGETS)}. Default: all that TensorRT-RTX "
            "builds the format for."
        ),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Context of the engine, in tokens. Default: the model's, up to 2048.")
    ] = None,
    max_batch: Annotated[
        int,
        typer.Option(help="Sequences that a TensorRT-LLM engine runs at once, at most; each step has a tree of each."),
    ] = 4,
    draft_vocab: Annotated[
        int, typer.Option(help="Tokens that drafts on the CPU are drawn from, the most frequent ones; 0 for all.")
    ] = 8192,
    scales: Annotated[
        Path | None, typer.Option(help="A calibration made elsewhere: an export, or the file of scales in it.")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help=f"Input channels that share a scale, {group_sizes()}")] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="Linears to leave in 16 bit besides those that always are: TensorRT-LLM names, such as '*mlp.proj*'."
        ),
    ] = None,
    trtllm_version: Annotated[
        str, typer.Option(help="TensorRT-LLM release that will build the engine: 0.17 to 1.2.1.")
    ] = "1.2.1",
    pp: Annotated[int, typer.Option(help="Pipeline-parallel stages; Medusa engines need 1.")] = 1,
    format: Annotated[
        str,
        typer.Option(
            help="trtllm; hf: ModelOpt's unified checkpoint; or the heads alone: vllm-heads, medusa-v1, medusa-v2."
        ),
    ] = "trtllm",
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts like those that will be served, JSONL: the tree is measured on them.")
    ] = None,
    tree_cost: Annotated[
        Path | None,
        typer.Option(help="cost.json of TensorRT-LLM's GPU. Default: see --gpu-model."),
    ] = None,
    gpu_model: Annotated[
        str | None,
        typer.Option(
            help=f"GPU that TensorRT-LLM's tree is for: {', '.join(BY_KEY)}. Step costs are estimated from its data sheet. Default: "
            "all trees up to 64 nodes are taken to cost the same."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what it would take, as [bold]plan[/] does, and write nothing.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Turn a Hugging Face checkpoint with Medusa heads into a TensorRT-LLM checkpoint, an ONNX graph and an engine.

    Example: [bold]medusa-export --ckpt model --heads heads --quant fp8 --output out[/]
    """
    if context.invoked_subcommand:
        return
    arguments = _export_arguments(locals())
    output = arguments.output
    if dry_run:
        from medusa_export.core.artifacts.manifest import check_free_space

        sizing = _print_plan(arguments)
        check_free_space(output, sizing.disk_reserve)
        return
    from medusa_export.engines.backends import engine_builder
    from medusa_export.engines.trtllm.build import next_steps
    from medusa_export.engines.tuning.auto import choose_tree
    from medusa_export.engines.verify.selfcheck import check_engine
    from medusa_export.exporter.pipeline.export import export
    from medusa_export.heads.contract.engine_tools import EngineTools

    builder = engine_builder(arguments.engine)
    with progress_bars() as progress:
        say = partial(stderr.print, soft_wrap=True, markup=False)
        written = export(arguments, EngineTools(check_engine, choose_tree, builder), progress, say)
    stdout.print(f"{'wrote' if written else 'up to date:'} {output}", soft_wrap=True)
    expected = expected_line(output)
    for line in [*([expected] if expected else ()), *next_steps(output)]:
        stdout.print(line, soft_wrap=True, markup=False)


def _export_arguments(given: dict[str, Any]) -> Any:
    """ExportArguments from the values of the flags."""
    from medusa_export.exporter.job.arguments import ExportArguments

    ckpt = given["ckpt"]
    if ckpt is None:
        raise ConfigError("--ckpt", "nothing", "the directory of the base model", "see medusa-export --help")
    given = {**given, "exclude": tuple(given["exclude"] or ())}
    output = given["output"] or ckpt.resolve().with_name(f"{ckpt.resolve().name}-{given['quant']}")
    return ExportArguments(**{item.name: given[item.name] for item in fields(ExportArguments)} | {"output": output})


def _print_plan(arguments: Any, **options: Any) -> Any:
    from medusa_export.exporter.sizing.estimate import plan_export
    from medusa_export.exporter.sizing.report import print_sizing

    sizing = plan_export(arguments, **options)
    print_sizing(sizing, stdout)
    return sizing


def _with_export_flags(command: Any) -> Any:
    """Give a command the flags of the export before its own; it gets their values as keyword arguments."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    shared = inspect.signature(export_command, eval_str=True).parameters
    parameters = [shared[name] for name in shared if name not in ("context", "dry_run")]
    parameters += [parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD]
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    command.__signature__ = inspect.Signature(keywords)  # what typer reads
    return command


@export_app.command("plan")
@_with_export_flags
def plan_command(
    batch: Annotated[int, typer.Option(help="Sequences that run at once on the GPU.")] = 1,
    context: Annotated[
        int | None, typer.Option(help="Tokens of each, prompt and output. Default: the model's, up to 4096.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here as JSON.")] = None,
    **given: Any,
) -> None:
    """Print what an export would take: files, disk, RAM, and which GPUs run its engine. Reads headers, writes nothing.

    Example: [bold]medusa-export plan --ckpt model --heads heads --quant fp8 --tp 2 --batch 8[/]
    """
    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise OutputError(str(json_file), "no such directory", "an existing one", "create it first")
    sizing = _print_plan(_export_arguments(given), batch=batch, context=context)
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(sizing), indent=1) + "\n", encoding="utf-8")


@export_app.command("verify")
def verify_command(
    out: Annotated[
        Path, typer.Argument(help="A directory that medusa-export wrote, or any TensorRT-LLM Medusa checkpoint.")
    ],
    verbose: Verbose = False,
) -> None:
    """Check an export again: hashes, what TensorRT-LLM's loader asks for, scales; print what quantization did to the weights.

    Exit code 1 when something is wrong.
    """
    from medusa_export.core.artifacts.manifest import MANIFEST, read_manifest
    from medusa_export.exporter.verify.checkpoint import verify_export
    from medusa_export.exporter.verify.error_table import error_table

    problems = verify_export(out)
    if (out / MANIFEST).is_file() and not problems:
        errors = read_manifest(out).get("quantization_error")
        if errors:
            stdout.print(error_table(errors))
    for problem in problems:
        stdout.print(problem, soft_wrap=True)
    if problems:
        raise typer.Exit(1)
    stdout.print(f"{out}: complete and consistent", soft_wrap=True)


def export_main() -> None:
    """Entry point of medusa-export."""
    main(export_app)
