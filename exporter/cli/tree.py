"""medusa-tree: parse, call one function, print. Like the other cli files, it may import across."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from medusa_export.core.errors import ConfigError, OutputError
from medusa_export.exporter.cli import gpu_cost
from medusa_export.exporter.cli.console import Verbose, command_app, main, progress_bars, stdout
from medusa_export.exporter.cli.tree_tables import _print_acceptance, _print_cost, _print_crossover, _print_search
from medusa_export.heads.roofline import step

tree_app = command_app()


Engine = Annotated[Path, typer.Option(help="The engine directory of an export.")]
Prompts = Annotated[Path, typer.Option(help="JSONL with turns, messages or prompt.")]
Limit = Annotated[int | None, typer.Option(help="Only the first so many prompts.")]
NewTokens = Annotated[int, typer.Option(help="Tokens of an answer, at most.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 takes one a core.")]
MaxNodes = Annotated[int, typer.Option(help="The largest tree to measure, its root included.")]
PastLength = Annotated[int, typer.Option(help="Tokens in the key/value cache.")]
Rounds = Annotated[int, typer.Option(help="Interleaved repetitions of the cost's measurement.")]


@tree_app.callback()
def tree_command() -> None:
    """Choose the Medusa tree by what the heads get right and by what a step costs."""


@tree_app.command("calibrate")
def calibrate_command(
    engine: Engine,
    prompts: Prompts,
    output: Annotated[Path, typer.Option(help="acceptance.json to write.")] = Path("acceptance.json"),
    limit: Limit = None,
    max_new_tokens: NewTokens = 128,
    threads: Threads = 0,
    verbose: Verbose = False,
) -> None:
    """Count, along the engine's own greedy answers, which rank every true token has in every head.

    Example: [bold]medusa-tree calibrate --engine out/engine --prompts chats.jsonl[/]
    """
    _require_parent(output)
    opened, encoded = _open(engine, prompts, limit, max_new_tokens, threads)
    with progress_bars() as progress:
        body = _calibrate(
            opened, encoded, max_new_tokens, progress, output, {"engine": str(engine), "prompts": str(prompts)}
        )
    _print_acceptance(body)
    stdout.print(f"wrote {output}", soft_wrap=True)


@tree_app.command("cost")
def cost_command(
    engine: Annotated[Path | None, typer.Option(help="The engine directory of an export, to measure.")] = None,
    output: Annotated[Path, typer.Option(help="cost.json to write.")] = Path("cost.json"),
    max_nodes: MaxNodes = 64,
    past_length: Annotated[
        list[int] | None, typer.Option(help="Tokens in the cache; may be given again. Default: 256.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Sequences in a step; may be given again. Default: 1, the engine itself.")
    ] = None,
    rounds: Rounds = 9,
    threads: Threads = 0,
    gpu: gpu_cost.GpuName = None,
    ckpt: gpu_cost.Ckpt = None,
    heads: gpu_cost.Heads = None,
    num_heads: gpu_cost.NumHeads = 4,
    quant: gpu_cost.Quant = "none",
    kv_cache: gpu_cost.KvCacheName = "none",
    quant_heads: gpu_cost.QuantHeads = False,
    tp: gpu_cost.Tp = 1,
    bandwidth_efficiency: gpu_cost.Bandwidth = step.BANDWIDTH,
    arithmetic_efficiency: gpu_cost.Arithmetic = step.ARITHMETIC,
    kernel_us: gpu_cost.KernelUs = step.KERNEL_US,
    collective_us: gpu_cost.CollectiveUs = step.COLLECTIVE_US,
    verbose: Verbose = False,
) -> None:
    """Measure what a step costs by the number of nodes, and a draft by the number of heads; or estimate it for a GPU.

    With --batch, steps of several sequences are measured, of one too if 1 is among them: those of the server. With --gpu, nothing
    runs: costs follow from the model's shape and the GPU's data sheet, by default for 1 to 64 sequences behind 256 to 32768 tokens.

    Example: [bold]medusa-tree cost --engine out/engine[/]

    Example: [bold]medusa-tree cost --gpu h100 --ckpt model --quant fp8[/]
    """
    given = dict(locals())
    _require_parent(output)
    if (engine is None) == (gpu is None):
        got = "neither --engine nor --gpu" if engine is None else "--engine and --gpu"
        raise ConfigError("--engine", got, "one of them: an engine to measure, or a GPU to estimate for", "give one")
    if gpu is not None:
        gpu_cost.print_estimate(gpu_cost.write_estimate(output, given))
    else:
        _write_measured(output, given)
    stdout.print(f"wrote {output}", soft_wrap=True)


def _write_measured(output: Path, given: dict[str, Any]) -> None:
    from medusa_export.engines.tuning.cost import PAST_LENGTH, measure_cost, write_costs

    past_length, max_nodes, rounds = (given[name] for name in ("past_length", "max_nodes", "rounds"))
    info, measured = _steps(given["engine"], given["batch"], given["threads"])
    lengths = past_length or [PAST_LENGTH]
    with progress_bars() as progress:
        curves = [
            measure_cost(
                steps, max_nodes=max_nodes, past_length=past, rounds=rounds,
                progress=lambda *at, name=f"cost, batch {steps.batch}, past {past}": progress(name, *at),
            )
            for steps in measured
            for past in lengths
        ]  # fmt: skip
    write_costs(output, curves, info)
    for curve in curves:
        _print_cost(curve)


def _steps(engine: Path, batches: list[int] | None, threads: int) -> Any:
    """EngineInfo, and what to measure: the engine's own steps, or those of every batch size."""
    from medusa_export.engines.backends import open_engine
    from medusa_export.engines.onnxruntime.batch_engine import TreeBatchDecoder
    from medusa_export.engines.tuning.cost import BatchSteps, SingleSteps

    if not batches:
        opened = open_engine(engine, threads=threads)
        return opened.info, [SingleSteps(opened)]
    if min(batches) < 1:
        raise ConfigError("--batch", f"{min(batches)}", "1 or more", "correct it")
    decoder = TreeBatchDecoder(engine, slots=max(batches), threads=threads)
    return decoder.info, [BatchSteps(decoder, batch) for batch in batches]


@tree_app.command("search")
def search_command(
    engine: Annotated[
        Path | None, typer.Option(help="Engine to measure on what no file says, and to run trees.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts for that: JSONL with turns, messages or prompt.")
    ] = None,
    acceptance: Annotated[Path | None, typer.Option(help="acceptance.json, of medusa-tree or medusa-train.")] = None,
    cost: Annotated[Path | None, typer.Option(help="cost.json, measured here or on another machine.")] = None,
    output: Annotated[Path, typer.Option(help="tree.json to write: --tree of the other commands.")] = Path("tree.json"),
    picture: Annotated[Path | None, typer.Option(help="Draw the tree here: .svg or .png.")] = None,
    max_draft_len: Annotated[int, typer.Option(help="Draft tokens, at most.")] = 63,
    sizes: Annotated[
        list[int] | None, typer.Option("--nodes", help="Only trees of so many nodes, the root included.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Take the cost at this batch size.")] = 1,
    past_length: Annotated[
        int | None, typer.Option(help="Take the cost at this length. Default: the first in the file.")
    ] = None,
    confirm: Annotated[int, typer.Option(help="Run so many of the best trees and take the fastest.")] = 0,
    limit: Limit = None,
    max_new_tokens: NewTokens = 128,
    threads: Threads = 0,
    verbose: Verbose = False,
) -> None:
    """Find the tree that yields most tokens a second. What --acceptance and --cost do not say is measured on --engine.

    Example: [bold]medusa-tree search --engine out/engine --prompts chats.jsonl --confirm 3 --picture tree.svg[/]
    """
    from medusa_export.engines.tuning.crossover import advice, crossover_rows
    from medusa_export.engines.tuning.picture import draw
    from medusa_export.engines.tuning.search import confirm as run_trees
    from medusa_export.engines.tuning.search import search, sentence, tree_json
    from medusa_export.heads.trees.acceptance import Acceptance
    from medusa_export.heads.trees.step_costs import cost_curve, load_costs, select

    given = dict(locals())
    _check_search(given)
    counted = Acceptance.load(acceptance) if acceptance else None
    curves = load_costs(cost) if cost else []
    if curves:
        select(curves, batch=batch, past_length=past_length)
    opened, encoded = None, []
    if engine and (counted is None or not curves or confirm):
        opened, encoded = _open(engine, prompts, limit, max_new_tokens, threads)
    with progress_bars() as progress:
        counted = counted or _count(opened, encoded, max_new_tokens, progress)
        curves = curves or [_measure_cost(opened, max_draft_len + 1, past_length, progress)]
        curve = cost_curve(select(curves, batch=batch, past_length=past_length))
        found = search(counted, curve, max_draft_len=max_draft_len, sizes=sizes)
        if confirm and opened is not None:  # it was opened for that
            ids = [input_ids for _, _, input_ids in encoded]
            found = run_trees(
                found, counted, opened, ids, count=confirm, max_new_tokens=max_new_tokens,
                progress=lambda *at: progress("trees", *at),
            )  # fmt: skip
    crossover = crossover_rows(counted, curves, max_draft_len)
    output.write_text(tree_json(found, crossover), encoding="utf-8")
    if picture:
        draw(picture, found, counted)
    _print_search(found)
    if len(crossover) > 1:
        _print_crossover(crossover)
    for line in filter(None, (sentence(found), advice(crossover))):
        stdout.print(line, soft_wrap=True)
    stdout.print(f"wrote {output}", soft_wrap=True)


def _count(opened: Any, encoded: Any, max_new_tokens: int, progress: Any) -> Any:
    """Acceptance of the engine's heads on the prompts."""
    from medusa_export.engines.tuning.acceptance import calibrate
    from medusa_export.heads.trees.acceptance import Acceptance

    done = iter(range(1, len(encoded) + 1))
    answers = calibrate(
        opened, encoded, max_new_tokens=max_new_tokens,
        progress=lambda: progress("acceptance", next(done), len(encoded)),
    )  # fmt: skip
    return Acceptance.from_answers(answers)


def _measure_cost(opened: Any, max_nodes: int, past_length: int | None, progress: Any) -> dict[str, Any]:
    from medusa_export.engines.tuning.cost import PAST_LENGTH, SingleSteps, measure_cost

    return measure_cost(
        SingleSteps(opened), max_nodes=max_nodes, past_length=past_length or PAST_LENGTH,
        progress=lambda *at: progress("cost", *at),
    )  # fmt: skip


def _check_search(given: dict[str, Any]) -> None:
    """Raise ConfigError or OutputError for what cannot work, before anything is measured."""
    missing = [f"--{name}" for name in ("acceptance", "cost") if given[name] is None]
    if given["confirm"]:
        missing.append("--confirm")
    if missing and given["engine"] is None:
        expected = "--engine, to measure it on" if missing[0] != "--confirm" else "--engine, to run trees on"
        raise ConfigError(f"--{missing[0].strip('-')}", "no engine", expected, "give one")
    if given["prompts"] is None and (given["acceptance"] is None or given["confirm"]):
        raise ConfigError("--prompts", "nothing", "prompts to run the engine on", "give a JSONL file")
    if given["cost"] is None and given["batch"] != 1:
        raise ConfigError("--batch", f"{given['batch']}", "1, or --cost with that batch size", "give a file")
    if given["max_draft_len"] < 1:
        raise ConfigError("--max-draft-len", f"{given['max_draft_len']}", "1 or more", "correct it")
    for name in ("output", "picture"):
        if given[name] is not None:
            _require_parent(given[name])
    if given["picture"] is not None and given["picture"].suffix not in (".svg", ".png"):
        raise ConfigError("--picture", f"{given['picture']}", "a name that ends with .svg or .png", "rename it")


def _require_parent(path: Path) -> None:
    if not path.resolve().parent.is_dir():
        raise OutputError(str(path), "no such directory", "an existing one", "create it first")


def _open(engine: Path, prompts: Path | None, limit: int | None, max_new_tokens: int, threads: int) -> Any:
    """The engine, and the prompts as it takes them."""
    from medusa_export.core.text.prompts import load_prompts
    from medusa_export.core.text.tokenizer import read_tokenizer
    from medusa_export.engines.backends import open_engine
    from medusa_export.engines.measure.prompts import encode_prompts

    if max_new_tokens < 2:
        raise ConfigError("--max-new-tokens", f"{max_new_tokens}", "2 or more", "raise it")
    loaded = load_prompts(prompts, limit) if prompts else []
    tokenizer = read_tokenizer(engine)
    opened = open_engine(engine, threads=threads)
    return opened, encode_prompts(tokenizer, opened.info, loaded, max_new_tokens=max_new_tokens)


def _calibrate(
    opened: Any, encoded: Any, max_new_tokens: int, progress: Any, output: Path, source: dict[str, Any]
) -> Any:
    from medusa_export.engines.tuning.acceptance import calibrate
    from medusa_export.heads.trees.acceptance import write_calibration

    done = iter(range(1, len(encoded) + 1))
    answers = calibrate(
        opened, encoded, max_new_tokens=max_new_tokens,
        progress=lambda: progress("prompts", next(done), len(encoded)),
    )  # fmt: skip
    return write_calibration(output, answers, {**source, "engine_source": opened.info.source})


def tree_main() -> None:
    """Entry point of medusa-tree."""
    main(tree_app)
