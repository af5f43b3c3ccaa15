"""medusa-run as one function: prompts in, report out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from medusa_export.core.artifacts.hashing import describe, list_files
from medusa_export.core.artifacts.output_file import output_file
from medusa_export.core.errors import ConfigError
from medusa_export.core.flags import require_bounds
from medusa_export.core.json_fields import read_json
from medusa_export.core.text.prompts import Prompt, load_prompts
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.backends import BACKENDS, open_engine
from medusa_export.engines.bench.arguments import RunArguments
from medusa_export.engines.bench.compare import compare_engines, paired, require_comparable
from medusa_export.engines.bench.findings import (
    Named,
    accepted_findings,
    expectation_of,
    reference_findings,
    run_findings,
    step_findings,
)
from medusa_export.engines.bench.report import build_report
from medusa_export.engines.bench.runner import PromptResult, RunResult, continuations, parted_run, run_prompts
from medusa_export.engines.bench.speeds import ALL_MODES, DECODING, MODES, WHOLE, TimedPart, tokens_per_second
from medusa_export.engines.bench.sweeps import batch_sweep, length_sweep, require_sweeps
from medusa_export.engines.bench.wording import BASELINE
from medusa_export.engines.decoding.batch_trees import BatchTrees
from medusa_export.engines.decoding.draft_kinds import (
    DRAFTS,
    Engine,
    drafts_possible,
    open_drafter,
    require_drafts,
    settle_drafts,
)
from medusa_export.engines.decoding.drafters import Drafter
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE, ScoringEngine
from medusa_export.engines.measure.prompts import EncodedPrompt, encode_prompts
from medusa_export.engines.onnxruntime.batch_engine import TreeBatchDecoder
from medusa_export.engines.verify.reference import compare_with_checkpoint
from medusa_export.heads.contract.engine_info import TREE_FILE, EngineInfo, find_engine
from medusa_export.heads.decoding.accept import Typical
from medusa_export.heads.decoding.sampling import Sampler
from medusa_export.heads.trees.acceptance import ACCEPTANCE_FILE, Acceptance
from medusa_export.heads.trees.tree import Tree, load_tree

MEASURED = "prompts"  # the stage that can be stopped
SHOWN_TOKENS = 24  # of a text before and after a divergence
REFERENCE_PROMPTS = 8  # prompts on which the engine is compared with the checkpoint
RATED_PROMPTS = 64  # whose two outputs part, and are rated by the checkpoint

Progress = Callable[..., None]  # stage, done, total, and a note that may follow


def run(
    arguments: RunArguments,
    progress: Progress = lambda *_: None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Measure an engine; the report's ``failures`` say why the command should fail.

    Args:
        arguments: the flags.
        progress: called with a stage, how much of it is done, of how much, and what is known so far.
        stopped: asked after every prompt; the report has what was run until then, and leaves out the rest of what was asked for.

    Raises:
        MedusaExportError: an engine, tree or prompts file that cannot be used.
    """
    _check(arguments)
    arguments = _with_engines(arguments)
    prompts = load_prompts(arguments.prompts, arguments.limit)
    tokenizer = read_tokenizer(arguments.engine)
    engine = open_engine(
        arguments.engine, threads=arguments.threads, trtllm_api=arguments.trtllm_api, timeout=arguments.timeout
    )
    if arguments.sweep_batch and not BACKENDS[engine.info.backend].runs_batches:
        able = " or ".join(name for name, backend in BACKENDS.items() if backend.runs_batches)
        raise ConfigError("--sweep-batch", f"the engine {engine.info.backend}", able, "leave it out")
    tree = load_tree(arguments.tree or str(arguments.engine / TREE_FILE))
    engine.info.require_tree(tree)
    drafts = settle_drafts(arguments.drafts, engine.info, own_tree=arguments.tree is not None)
    arguments = replace(arguments, drafts=drafts)  # the report says what was run
    way, ways = _ways(engine, tree, arguments)
    encoded = encode_prompts(tokenizer, engine.info, prompts, max_new_tokens=arguments.max_new_tokens)
    longest = engine.info.max_length - arguments.max_new_tokens
    require_sweeps(arguments.sweep_batch, arguments.sweep_length, prompts=len(encoded), longest=longest)
    other = _open_other(arguments, engine.info) if arguments.compare else None
    acceptance = _acceptance(arguments.engine, tree)
    result = run_prompts(
        engine, way, encoded, ways=ways, max_new_tokens=arguments.max_new_tokens, repeats=arguments.repeats, seed=arguments.seed,
        temperature=arguments.temperature, top_p=arguments.top_p, typical=Typical() if arguments.typical else None, other=other,
        progress=_told(progress, arguments.repeats), stopped=stopped,
    )  # fmt: skip
    if stopped():
        prompts = [prompts[index] for index in result.kept or ()]
        arguments, other = replace(arguments, reference=None, sweep_batch=(), sweep_length=()), None
    reference = _reference(engine, result, arguments, progress) if arguments.reference else None
    step_noise, found = step_findings(engine, tree, result, arguments.seed)
    plain = {key: _plain(value) for key, value in asdict(arguments).items()}
    report = build_report(result, tree, engine.info, plain, reference, num_gpus=getattr(engine, "num_gpus", 1))
    report |= {"files": describe(list_files(arguments.engine, arguments.engine)), **acceptance}
    report["stopped"] = {"prompts": len(result.prompts), "of": len(encoded)} if stopped() else None
    report["expected"] = _expected(arguments.tree or str(arguments.engine / TREE_FILE))
    report["sweeps"] = _sweeps(engine, way, encoded, arguments, progress)
    references = [prompt.reference for prompt in prompts]
    report["comparison"] = _comparison(engine, other, result, references, tokenizer, progress) if other else None
    for entry, prompt in zip(report["parity"]["divergences"], filter(_has_parted, result.prompts), strict=True):
        entry["text"] = _texts(prompt, entry["position"], tokenizer)
    if arguments.save_outputs:
        _save_outputs(arguments.save_outputs, result, tokenizer)
    report |= {"tree_logits": step_noise, **_findings(report, arguments, engine, tree, way, prompts, result, found)}
    return report


def _with_engines(arguments: RunArguments) -> RunArguments:
    """The directories of the engines, also where exports were given; another directory is refused."""
    other_engine = find_engine(arguments.compare) if arguments.compare else None
    found = replace(arguments, engine=find_engine(arguments.engine), compare=other_engine)
    for directory in filter(None, (found.engine, found.compare)):
        EngineInfo.load(directory)
    return found


def _check(arguments: RunArguments) -> None:
    """Raise ConfigError for values that cannot be meant, before anything is opened."""
    require_bounds(arguments)
    if arguments.temperature:
        Sampler(arguments.temperature, 0, arguments.top_p)
    elif arguments.typical or arguments.top_p != 1:
        flag = "--typical" if arguments.typical else "--top-p"
        raise ConfigError(flag, "no --temperature", "one above 0", "give one: greedy decoding draws nothing")


def _ways(engine: Any, tree: Tree, arguments: RunArguments) -> tuple[Tree | Drafter, dict[str, Tree | Drafter]]:
    """The drafts that are measured, and with --each-drafts the others."""
    if arguments.each_drafts:
        require_drafts("text", engine.info)
    names = [name for name in DRAFTS if drafts_possible(name, engine.info)] if arguments.each_drafts else []
    others = [name for name in names if name not in (BASELINE, arguments.drafts)]
    measured, *ways = (_way(name, arguments.engine, engine, tree) for name in (arguments.drafts, *others))
    return measured, dict(zip(others, ways, strict=True))


def _way(drafts: str, directory: Path, engine: Any, tree: Tree) -> Tree | Drafter:
    """What drafts for an engine; trees, where they are all of it, as every backend takes those.

    Args:
        drafts: a kind, settled.
        directory: of the engine, with what its drafter reads.
        engine: opened from there.
        tree: of its heads.
    """
    trees: dict[str, Tree] = {"heads": tree, BASELINE: AUTOREGRESSIVE}
    if drafts in trees:
        return trees[drafts]
    return open_drafter(drafts, Engine(directory, engine.info, BatchTrees({1: tree}), engine.max_nodes))


def _told(progress: Progress, repeats: int) -> Callable[[Sequence[PromptResult]], None]:
    """What is done, and what it gives so far: tokens a second without and with drafts, and how many outputs are equal."""

    def tell(results: Sequence[PromptResult]) -> None:
        reached = [prompt for prompt in results if prompt.baseline]
        without, drafted = tokens_per_second(reached, WHOLE).values()
        equal = sum(prompt.baseline[0].tokens == prompt.medusa[0].tokens for prompt in reached)
        note = f"{without:.1f} / {drafted:.1f} tokens/s, {equal} of {len(reached)} equal"
        progress(MEASURED, sum(len(prompt.baseline) for prompt in reached), repeats * len(results), note)

    return tell


def _plain(value: Any) -> Any:
    """A flag as JSON has it."""
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def _open_other(arguments: RunArguments, info: EngineInfo) -> tuple[ScoringEngine, Tree | Drafter]:
    """The engine of --compare, and what drafts for it: the same kind of drafts, from its own heads, tree and costs.

    Raises:
        ConfigError: an engine that does not compare, or that cannot draft like this one.
    """
    assert arguments.compare is not None  # the caller's condition, for the type checker
    if arguments.temperature:
        raise ConfigError("--compare", "--temperature", "greedy decoding", "leave one of them out")
    other = open_engine(
        arguments.compare, threads=arguments.threads, trtllm_api=arguments.trtllm_api, timeout=arguments.timeout
    )
    require_comparable(info, other.info)
    if drafts_possible(arguments.drafts, info) != drafts_possible(arguments.drafts, other.info):
        got = f"{arguments.drafts} for two engines of which one has no heads"
        raise ConfigError("--drafts", got, "text or none, which both can do", "choose one of them")
    require_drafts(arguments.drafts, other.info)
    tree = load_tree(str(arguments.compare / TREE_FILE))
    other.info.require_tree(tree)
    return other, _way(arguments.drafts, arguments.compare, other, tree)


def _comparison(
    engine: ScoringEngine, other: tuple[ScoringEngine, Tree | Drafter], result: RunResult,
    references: list[str], tokenizer: Any, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    done = iter(range(1, len(result.prompts) + 1))
    found = compare_engines(
        engine, other[0], result.prompts, references, tokenizer,
        max_length=min(engine.info.max_length, other[0].info.max_length),
        progress=lambda: progress("comparison", next(done), len(result.prompts)),
    )  # fmt: skip
    speeds = tokens_per_second(result.prompts, WHOLE, ALL_MODES)
    return found | {
        "precision": other[0].info.precision,
        "tokens_per_second": {mode: round(speed, 3) for mode, speed in speeds.items()},
        "speed": _speed_ratios(result, WHOLE),
        "decode_speed": _speed_ratios(result, DECODING),
    }


def _speed_ratios(result: RunResult, part: TimedPart) -> dict[str, float | None]:
    """This engine's throughput over the other's; None where no prompt has such tokens on both."""
    speeds = tokens_per_second(result.prompts, part, ALL_MODES)
    pairs = {
        "without_medusa": ("baseline", "other_baseline"),
        "with_medusa": ("medusa", "other_medusa"),
        "ours_with_to_other_without": ("medusa", "other_baseline"),
    }
    return {name: round(speeds[ours] / speeds[theirs], 4) if speeds else None for name, (ours, theirs) in pairs.items()}


def _sweeps(
    engine: ScoringEngine,
    tree: Tree | Drafter,
    encoded: list[EncodedPrompt],
    arguments: RunArguments,
    progress: Progress,
) -> dict[str, Any]:
    """What --sweep-batch and --sweep-length ask for."""
    prompts, found = [ids for _, _, ids in encoded], dict[str, Any]()
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "repeats": arguments.repeats}
    if arguments.sweep_batch:
        decoder = TreeBatchDecoder(arguments.engine, slots=max(arguments.sweep_batch), threads=arguments.threads)
        found["batch"] = batch_sweep(
            decoder, tree, prompts, arguments.sweep_batch, progress=lambda *at: progress("batches", *at), **options
        )
    if arguments.sweep_length:
        found["length"] = length_sweep(
            engine, tree, prompts, arguments.sweep_length, progress=lambda *at: progress("lengths", *at), **options
        )
    return found


def _acceptance(engine_dir: Path, tree: Tree) -> dict[str, Any]:
    """Accuracy of the heads and the share of each of the tree's paths, where acceptance was counted on this engine."""
    path = engine_dir / ACCEPTANCE_FILE
    if not path.is_file():
        return {"heads": [], "path_shares": []}
    counted = Acceptance.load(path)
    shares = [round(counted.paths.get(choice, 0) / counted.positions, 4) for choice in tree.choices]
    return {"heads": read_json(path).get("heads", []), "path_shares": shares}


def _expected(tree: str) -> list[dict[str, Any]]:
    """Rows of the tree's file that were estimated for a GPU; none of a preset, or where costs were measured."""
    path = Path(tree)
    body = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows = body.get("crossover", []) if isinstance(body, dict) else []  # a list of choices is a tree too
    return [{key: value for key, value in row.items() if key != "medusa_choices"} for row in rows if "estimated" in row]


def _has_parted(prompt: PromptResult) -> bool:
    return prompt.divergence is not None


def _texts(prompt: PromptResult, at: int, tokenizer: Any) -> dict[str, str]:
    """What both outputs say before and after they part.

    Args:
        prompt: whose outputs part.
        at: number of the first token that differs.
        tokenizer: the engine's.
    """
    plain, parting = prompt.baseline[0].tokens, parted_run(prompt).tokens
    return {
        "before": tokenizer.decode(plain[max(0, at - SHOWN_TOKENS) : at]),
        "baseline": tokenizer.decode(plain[at : at + SHOWN_TOKENS]),
        "medusa": tokenizer.decode(parting[at : at + SHOWN_TOKENS]),
    }


def _save_outputs(path: Path, result: RunResult, tokenizer: Any) -> None:
    """A line a prompt: what was generated without and with drafts, and how long each run took."""
    with output_file(path) as scratch, scratch.open("w", encoding="utf-8") as file:
        for prompt in result.prompts:
            row: dict[str, Any] = {"id": prompt.prompt_id, "category": prompt.category, "verdict": prompt.verdict}
            for mode in MODES:
                runs = getattr(prompt, mode)
                row[mode] = {
                    "text": tokenizer.decode(runs[0].tokens, skip_special_tokens=True),
                    "tokens": runs[0].tokens,
                    "finish_reason": runs[0].finish_reason,
                    "accepted": runs[0].accepted,
                    "prefill_ms": [round(run.prefill_ms, 3) for run in runs],
                    "decode_ms": [round(run.decode_ms, 3) for run in runs],
                }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _reference(engine: Any, result: RunResult, arguments: RunArguments, progress: Progress) -> dict[str, Any]:
    assert arguments.reference is not None  # the caller's condition, for the type checker
    texts = [(prompt.input_ids, prompt.baseline[0].tokens) for prompt in result.prompts[:REFERENCE_PROMPTS]]
    done = iter(range(1, len(texts) + 1))
    parted = [continuations(prompt) for prompt in result.prompts if prompt.divergence]
    pairs = [pair for pair in parted if pair[1] and pair[2]][:RATED_PROMPTS]
    found = compare_with_checkpoint(
        engine, arguments.reference, texts, parted=pairs, progress=lambda: progress("reference", next(done), len(texts))
    )
    measure = "log-likelihood of the continuation with drafts less that without, nats a token"
    return found | {"parted": paired(measure, found["parted"]) if pairs else None}


def _findings(
    report: dict[str, Any], arguments: RunArguments, engine: Any, tree: Tree, way: Tree | Drafter, prompts: list[Prompt],
    result: RunResult, found: list[Named],
) -> dict[str, Any]:  # fmt: skip
    """Everything that is wrong, by name, and why this run should fail, one line each."""
    greedy = not arguments.temperature
    foretold = expectation_of(arguments.engine, tree, result) if greedy else None
    found = [*run_findings(report, engine.info, arguments.min_speedup), *found]
    if greedy:
        found += accepted_findings(way, result, foretold, ignore=arguments.no_expectation)
    if greedy and arguments.reference:
        found += reference_findings(
            engine, arguments.reference, prompts[: len(result.prompts)], result, arguments.max_new_tokens
        )
    return {
        "foretold": foretold.as_dict() if foretold else None,
        "findings": [{"name": name, "message": message} for name, message in found],
        "failures": [message for _, message in found],
    }
