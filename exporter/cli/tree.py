"""medusa-tree: parse, call one function, print."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_export.core.artifacts.output_file import output_file, require_output_file, write_output
from medusa_export.core.errors import ConfigError
from medusa_export.core.flags import COUNT, NUMBER, flag
from medusa_export.engines.tuning.defaults import PAST_LENGTH
from medusa_export.exporter.cli.console import command_app, main, progress_bars, stdout
from medusa_export.exporter.cli.flags.commands import callback, command, require
from medusa_export.exporter.cli.gpu_cost import GPU, EstimateFlags, print_estimate, write_estimate
from medusa_export.exporter.cli.tree_tables import print_acceptance, print_cost, print_crossover, print_search
from medusa_export.heads.contract.engine_info import ENGINE_HELP, EngineInfo, find_engine

tree_app = command_app()
INPUT, OUTPUT, MEASUREMENT, SEARCH = "Input", "Output", "Measurement", "Search"  # headings of --help


@dataclass(frozen=True)
class PromptFlags:
    """Prompts to run an engine on, and how."""

    limit: int | None = flag(None, help="Use only the first N prompts.", panel=INPUT, metavar="N", bounds=NUMBER)
    max_new_tokens: int = flag(128, help="Maximum tokens of an answer.", panel=MEASUREMENT, bounds=NUMBER)
    threads: int = flag(0, help="CPU threads; 0: one per core.", panel=MEASUREMENT, bounds=COUNT)


@dataclass(frozen=True)
class CalibrateFlags:
    """What medusa-tree calibrate takes."""

    engine: Path = flag(help=ENGINE_HELP, panel=INPUT)
    prompts: Path = flag(help="Prompts: JSONL with turns, messages or prompt.", panel=INPUT)
    output: Path = flag(Path("acceptance.json"), help="File to write.", panel=OUTPUT)


@dataclass(frozen=True)
class CostFlags:
    """What medusa-tree cost takes."""

    engine: Path | None = flag(None, help=f"{ENGINE_HELP[:-1]}, to measure.", panel=INPUT)
    output: Path = flag(Path("cost.json"), help="File to write.", panel=OUTPUT)
    max_nodes: int | None = flag(
        None,
        help="The largest tree to measure, its root included.",
        panel=MEASUREMENT,
        default="64, or as many as fit",
        bounds=NUMBER,
    )
    past_length: tuple[int, ...] = flag(
        (),
        help="Tokens in the key/value cache. Can be repeated.",
        panel=MEASUREMENT,
        default=f"{PAST_LENGTH}, or half of a small context; with --gpu 256 to 32768",
        bounds=COUNT,
    )
    batch: tuple[int, ...] = flag(
        (),
        help="Sequences in a step. Can be repeated.",
        panel=MEASUREMENT,
        default="1, the engine itself; with --gpu 1 to 64",
        bounds=NUMBER,
    )
    rounds: int = flag(9, help="Interleaved repetitions of the measurement.", panel=MEASUREMENT, bounds=NUMBER)
    threads: int = flag(0, help="CPU threads; 0: one per core.", panel=MEASUREMENT, bounds=COUNT)


@dataclass(frozen=True)
class SearchFlags:
    """What medusa-tree search takes."""

    engine: Path | None = flag(
        None, help="Engine directory, or its export, to measure on, and to run trees on with --confirm.", panel=INPUT
    )
    prompts: Path | None = flag(
        None, help="Prompts to measure with: JSONL with turns, messages or prompt.", panel=INPUT
    )
    acceptance: Path | None = flag(None, help="acceptance.json of medusa-tree or medusa-train.", panel=INPUT)
    cost: Path | None = flag(None, help="cost.json, measured here or on another machine.", panel=INPUT)
    output: Path = flag(Path("tree.json"), help="File to write: other commands take it as --tree.", panel=OUTPUT)
    picture: Path | None = flag(None, help="Draw the tree to this file: .svg or .png.", panel=OUTPUT)
    max_draft_len: int = flag(63, help="Maximum draft tokens.", panel=SEARCH, bounds=NUMBER)
    nodes: tuple[int, ...] = flag(
        (),
        help="Consider only trees of N nodes, the root included. Can be repeated.",
        panel=SEARCH,
        metavar="N",
        bounds=NUMBER,
    )
    batch: int = flag(1, help="Batch size whose cost counts.", panel=SEARCH, bounds=NUMBER)
    past_length: int | None = flag(
        None,
        help="Tokens in the cache at which the cost counts.",
        panel=SEARCH,
        default=f"the first in the file; {PAST_LENGTH}, or half of a small context, where it is measured",
        bounds=COUNT,
    )
    confirm: int = flag(0, help="Run the N best trees and take the fastest.", panel=SEARCH, metavar="N", bounds=COUNT)


@callback(tree_app, alone=False)
def tree_command() -> None:
    """Choose the Medusa tree by what the heads get right and by what a step costs."""


@command(tree_app, "calibrate")
def calibrate_command(own: CalibrateFlags, asked: PromptFlags) -> None:
    """Count the rank that each head gives to the token the model chose, along the engine's own greedy answers.

    Example: medusa-tree calibrate --engine out/engine --prompts chats.jsonl
    """
    from medusa_export.heads.trees.acceptance import write_calibration

    require_output_file(own.output)
    engine, encoded = _read(own.engine, own.prompts, asked)
    with progress_bars() as progress:
        answers = _answers(engine, encoded, asked, "prompts", progress)
    source = {
        "engine": str(own.engine), "prompts": str(own.prompts), "engine_source": EngineInfo.load(engine).source,
    }  # fmt: skip
    print_acceptance(write_calibration(own.output, answers, source))
    stdout.print(f"wrote {own.output}", soft_wrap=True)


@command(tree_app, "cost")
def cost_command(own: CostFlags, estimate: EstimateFlags) -> None:
    """Measure what a step costs by the number of nodes, and a draft by the number of heads; or estimate it for a GPU.

    With --batch, measures the server's steps with several sequences, and with one if 1 is among them. With --gpu, nothing
    runs: costs follow from the model's shape and the GPU's data sheet.

    Example: medusa-tree cost --engine out/engine

    Example: medusa-tree cost --gpu h100 --ckpt model --quant fp8
    """
    require_output_file(own.output)
    if own.engine is not None and estimate.gpu is not None:
        raise ConfigError(
            "--engine", "--gpu too", "one of them: an engine to measure, or a GPU to estimate for", "choose"
        )
    require(estimate, {GPU: estimate.gpu is not None})
    if estimate.gpu is not None:
        print_estimate(write_estimate(own.output, estimate.gpu, estimate, own.batch, own.past_length))
    elif own.engine is not None:
        _write_measured(own, own.engine)
    else:
        expected = "one of them: an engine to measure, or a GPU to estimate for"
        raise ConfigError("--engine", "neither --engine nor --gpu", expected, "give one")
    stdout.print(f"wrote {own.output}", soft_wrap=True)


def _write_measured(own: CostFlags, engine: Path) -> None:
    from medusa_export.engines.tuning.cost import measure_cost, timed_trees, usual_past_length, write_costs

    info, measured = _steps(engine, own.batch, own.threads)
    pasts = own.past_length or (usual_past_length(info),)
    for past in pasts:
        timed_trees(info, max_nodes=own.max_nodes, past_length=past)  # all can be measured, or none is
    with progress_bars() as progress:
        curves = [
            measure_cost(
                steps, max_nodes=own.max_nodes, past_length=past, rounds=own.rounds,
                progress=lambda *at, name=f"cost, batch {steps.batch}, past {past}": progress(name, *at),
            )
            for steps in measured
            for past in pasts
        ]  # fmt: skip
    write_costs(own.output, curves, info)
    for curve in curves:
        print_cost(curve)


def _steps(engine: Path, batches: tuple[int, ...], threads: int) -> Any:
    """EngineInfo, and what to measure: the engine's own steps, or those of every batch size."""
    from medusa_export.engines.backends import open_engine
    from medusa_export.engines.onnxruntime.batch_engine import TreeBatchDecoder
    from medusa_export.engines.tuning.cost import BatchSteps, SingleSteps

    engine = find_engine(engine)
    if not batches:
        opened = open_engine(engine, threads=threads)
        return opened.info, [SingleSteps(opened)]
    decoder = TreeBatchDecoder(engine, slots=max(batches), threads=threads)
    return decoder.info, [BatchSteps(decoder, batch) for batch in batches]


@command(tree_app, "search")
def search_command(own: SearchFlags, asked: PromptFlags) -> None:
    """Find the tree that yields most tokens a second. Anything not given by --acceptance or
    --cost is measured on --engine.

    Example: medusa-tree search --engine out/engine --prompts chats.jsonl --confirm 3 --picture tree.svg
    """
    from medusa_export.engines.tuning.crossover import advice, crossover_rows
    from medusa_export.engines.tuning.picture import draw
    from medusa_export.engines.tuning.search import sentence, tree_json

    _check_search(own)
    found, counted, curves = _search(own, asked)
    crossover = crossover_rows(counted, curves, own.max_draft_len)
    write_output(own.output, tree_json(found, crossover))
    if own.picture:
        with output_file(own.picture) as scratch:
            draw(scratch, found, counted)
    print_search(found)
    if len(crossover) > 1:
        print_crossover(crossover)
    for line in filter(None, (sentence(found), advice(crossover))):
        stdout.print(line, soft_wrap=True)
    stdout.print(f"wrote {own.output}", soft_wrap=True)


def _search(own: SearchFlags, asked: PromptFlags) -> tuple[Any, Any, list[dict[str, Any]]]:
    """What was found, the acceptance and the cost curves that it rests on; measured where no file has them."""
    from medusa_export.engines.backends import open_engine
    from medusa_export.engines.tuning.search import confirm, search
    from medusa_export.heads.trees.acceptance import Acceptance
    from medusa_export.heads.trees.step_costs import cost_curve, load_costs, select

    counted = Acceptance.load(own.acceptance) if own.acceptance else None
    curves = load_costs(own.cost) if own.cost else []
    if curves:
        select(curves, batch=own.batch, past_length=own.past_length)
    engine: Path | None = None
    encoded: list[Any] = []
    if own.engine and (counted is None or not curves or own.confirm):
        engine, encoded = _read(own.engine, own.prompts, asked)
    if engine and not curves:
        _check_cost(engine, own)
    with progress_bars() as progress:
        if counted is None:
            counted = Acceptance.from_answers(_answers(engine, encoded, asked, "acceptance", progress))
        opened: Any = open_engine(engine, threads=asked.threads) if engine and (own.confirm or not curves) else None
        curves = curves or [_measure_cost(opened, own, progress)]
        curve = cost_curve(select(curves, batch=own.batch, past_length=own.past_length))
        found = search(counted, curve, max_draft_len=own.max_draft_len, sizes=own.nodes or None)
        if own.confirm:
            ids = [input_ids for _, _, input_ids in encoded]
            found = confirm(
                found, counted, opened, ids, count=own.confirm, max_new_tokens=asked.max_new_tokens,
                progress=lambda *at: progress("trees", *at),
            )  # fmt: skip
    return found, counted, curves


def _measure_cost(opened: Any, own: SearchFlags, progress: Any) -> dict[str, Any]:
    from medusa_export.engines.tuning.cost import SingleSteps, measure_cost

    return measure_cost(
        SingleSteps(opened), sizes=_sizes(own), past_length=own.past_length, progress=lambda *at: progress("cost", *at)
    )


def _check_cost(engine: Path, own: SearchFlags) -> None:
    """Raise ConfigError for costs that could not be measured, before acceptance is counted."""
    from medusa_export.engines.tuning.cost import timed_trees, usual_past_length

    info = EngineInfo.load(engine)
    past_length = usual_past_length(info) if own.past_length is None else own.past_length
    timed_trees(info, sizes=_sizes(own), past_length=past_length)


def _sizes(own: SearchFlags) -> list[int]:
    """Nodes of the steps that are timed."""
    from medusa_export.engines.tuning.cost import SIZES

    return [nodes for nodes in SIZES if nodes <= own.max_draft_len + 1]


def _check_search(own: SearchFlags) -> None:
    """Raise ConfigError or OutputError for what cannot work, before anything is measured."""
    missing = [name for name, path in (("--acceptance", own.acceptance), ("--cost", own.cost)) if path is None]
    if missing and own.engine is None:
        raise ConfigError(missing[0], "no engine", "--engine, to measure it on", "give one")
    if own.confirm and own.engine is None:
        raise ConfigError("--confirm", "no engine", "--engine, to run trees on", "give one")
    if own.prompts is None and (own.acceptance is None or own.confirm):
        raise ConfigError("--prompts", "nothing", "prompts to run the engine on", "give a JSONL file")
    if own.cost is None and own.batch != 1:
        raise ConfigError("--batch", f"{own.batch}", "1, or --cost with that batch size", "give a file")
    if own.nodes and min(own.nodes) > own.max_draft_len + 1:
        got, limit = f"{min(own.nodes)}, and --max-draft-len {own.max_draft_len}", f"{own.max_draft_len + 1} or less"
        raise ConfigError("--nodes", got, limit, "raise --max-draft-len or choose smaller trees")
    for path in (own.output, own.picture):
        require_output_file(path)
    if own.picture is not None and own.picture.suffix not in (".svg", ".png"):
        raise ConfigError("--picture", f"{own.picture}", "a name that ends with .svg or .png", "rename it")


def _read(engine: Path, prompts: Path | None, asked: PromptFlags) -> tuple[Path, Any]:
    """The engine's directory, and the prompts as it takes them."""
    from medusa_export.core.text.prompts import load_prompts
    from medusa_export.core.text.tokenizer import read_tokenizer
    from medusa_export.engines.measure.prompts import encode_prompts

    if asked.max_new_tokens < 2:
        raise ConfigError("--max-new-tokens", f"{asked.max_new_tokens}", "2 or more", "raise it")
    loaded = load_prompts(prompts, asked.limit) if prompts else []
    engine = find_engine(engine)
    info, tokenizer = EngineInfo.load(engine), read_tokenizer(engine)
    return engine, encode_prompts(tokenizer, info, loaded, max_new_tokens=asked.max_new_tokens)


def _answers(engine: Any, encoded: Any, asked: PromptFlags, stage: str, progress: Any) -> Any:
    """The engine's greedy answers, with the ranks that its heads gave to every token."""
    from medusa_export.engines.backends import open_decoder
    from medusa_export.engines.tuning.acceptance import AT_ONCE, measure_acceptance

    done = iter(range(1, len(encoded) + 1))
    return measure_acceptance(
        open_decoder(engine, slots=AT_ONCE, threads=asked.threads), encoded, max_new_tokens=asked.max_new_tokens,
        progress=lambda: progress(stage, next(done), len(encoded)),
    )  # fmt: skip


def tree_main() -> None:
    """Entry point of medusa-tree."""
    main(tree_app)
