"""Runs an engine without and with drafts on the same prompts, interleaved, and judges speed and parity."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from medusa_export.engines.decoding.drafters import Drafter
from medusa_export.engines.decoding.generate import generate
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE, Generation, ScoringEngine
from medusa_export.engines.verify.parity import Divergence, explain, first_divergence, logit_noise, verdict
from medusa_export.heads.decoding.accept import Typical
from medusa_export.heads.decoding.sampling import Sampler
from medusa_export.heads.trees.tree import Tree

WARMUP_TOKENS = 16
NOISE_PROMPTS = 4  # prompts on which the logit noise is measured
NOISE_TOKENS = 64


@dataclass
class PromptResult:
    """One prompt's runs.

    Attributes:
        baseline, medusa: one Generation a repeat.
        ways: the same with other drafts, by their name.
        other_baseline, other_medusa: those of the engine that this one is compared with, if any.
        divergence: where the measured output parts from the one without drafts, in the first repeat in which it does.
        verdict: of it, "exact", "tie" or "mismatch"; "other" for an output that differs and may, with typical acceptance.
        way_verdicts: the same with the other drafts, by their name.
    """

    prompt_id: str
    category: str
    input_ids: list[int]
    baseline: list[Generation]
    medusa: list[Generation]
    divergence: Divergence | None = None
    verdict: str = "exact"
    other_baseline: list[Generation] = field(default_factory=list)
    other_medusa: list[Generation] = field(default_factory=list)
    ways: dict[str, list[Generation]] = field(default_factory=dict)
    way_verdicts: dict[str, str] = field(default_factory=dict)

    def runs(self, name: str) -> list[Generation]:
        """Of a mode, or of other drafts."""
        found: list[Generation] = self.ways[name] if name in self.ways else getattr(self, name)
        return found

    def total_ms(self, mode: str) -> float:
        """Median time of the whole answer, prefill included. ``mode`` names a list of runs."""
        return median(run.total_ms for run in self.runs(mode))

    def decode_ms(self, mode: str) -> float:
        """Median time of the steps behind the prefill; a few microseconds, or nothing, where there are none."""
        return median(run.decode_ms for run in self.runs(mode))

    def tokens(self, mode: str) -> int:
        """Generated tokens."""
        return len(self.runs(mode)[0].tokens)

    def decoded_tokens(self, mode: str) -> int:
        """Those that steps gave: all but the first, which is the prefill's."""
        return self.tokens(mode) - 1


@dataclass
class RunResult:
    """The runs of all prompts, or of those that were reached before somebody stopped them.

    Attributes:
        tolerance: what parity of the measured drafts was judged by.
        kept: numbers of these prompts among those asked for; None for all of them.
    """

    prompts: list[PromptResult]
    tolerance: float
    kept: list[int] | None = None


def run_prompts(
    engine: ScoringEngine,
    tree: Tree | Drafter,
    prompts: Sequence[tuple[str, str, list[int]]],
    *,
    max_new_tokens: int,
    repeats: int,
    seed: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    typical: Typical | None = None,
    other: tuple[ScoringEngine, Tree | Drafter] | None = None,
    ways: Mapping[str, Tree | Drafter] | None = None,
    progress: Callable[[Sequence[PromptResult]], None] = lambda results: None,
    stopped: Callable[[], bool] = lambda: False,
) -> RunResult:
    """Measure and judge.

    Within a repeat all modes run one after the other on each prompt, in an order that alternates, so that a slow minute of the
    machine hits all.

    Args:
        prompts: (id, category, input_ids).
        repeats: runs of every prompt in either mode; times are medians over them.
        seed: order of the prompts, and with the prompt's number what its tokens are drawn with.
        temperature: draw tokens at it; 0: decode greedily.
        top_p: draw from the smallest set of tokens with this probability.
        typical: how drafts are accepted with a tree; None: losslessly. Needs a temperature.
        other: another engine and what drafts for it, to be run in between.
        ways: other drafts for this engine, to be run in between too, by name.
        progress: called after every turn, with the results so far of all prompts.
        stopped: asked after every turn of a prompt; the result has what was run until then, once the first prompt is through.
    """
    results = [
        PromptResult(key, category, ids, [], [], ways={way: [] for way in ways or {}}) for key, category, ids in prompts
    ]
    eos = engine.info.eos_token_ids
    modes = _modes(engine, tree, other, ways or {})

    def sampler(index: int) -> Sampler | None:
        return Sampler(temperature, (seed, index), top_p) if temperature else None

    for _, mode_engine, mode_tree in modes:
        generate(mode_engine, results[0].input_ids, mode_tree, max_new_tokens=WARMUP_TOKENS, eos_token_ids=())
    for index, is_odd in _turns(len(results), repeats, seed):
        result = results[index]
        for name, mode_engine, mode_tree in modes if is_odd else modes[::-1]:
            run = generate(
                mode_engine, result.input_ids, mode_tree,
                max_new_tokens=max_new_tokens, eos_token_ids=eos, sampler=sampler(index), typical=typical,
            )  # fmt: skip
            result.runs(name).append(run)
        progress(results)
        if stopped():
            break
    kept = {index: result for index, result in enumerate(results) if result.baseline}
    if typical:
        return RunResult(_not_judged(list(kept.values())), 0.0, list(kept))
    return RunResult(list(kept.values()), _judge(engine, tree, ways or {}, kept, sampler), list(kept))


def _turns(count: int, repeats: int, seed: int) -> Iterator[tuple[int, bool]]:
    """Every prompt once a repeat, in another order each time, and whether its modes run in the given order or the other way round."""
    order = list(range(count))
    chance = random.Random(seed)
    for repeat in range(repeats):
        chance.shuffle(order)
        for turn, index in enumerate(order):
            yield index, bool((turn + repeat) % 2)


def _not_judged(results: list[PromptResult]) -> list[PromptResult]:
    """Of typical acceptance: outputs may differ."""
    for result in results:
        result.verdict = _equal_or_other(result, "medusa")
        result.way_verdicts = {name: _equal_or_other(result, name) for name in result.ways}
    return results


def _equal_or_other(result: PromptResult, name: str) -> str:
    return "exact" if first_divergence(result.baseline[0], result.runs(name)[0]) is None else "other"


def _modes(
    engine: ScoringEngine,
    tree: Tree | Drafter,
    other: tuple[ScoringEngine, Tree | Drafter] | None,
    ways: Mapping[str, Tree | Drafter],
) -> list[tuple[str, ScoringEngine, Tree | Drafter]]:
    """What is run in turn: its name, the engine and its drafts."""
    modes: list[tuple[str, ScoringEngine, Tree | Drafter]] = [
        ("baseline", engine, AUTOREGRESSIVE),
        ("medusa", engine, tree),
        *((name, engine, way) for name, way in ways.items()),
    ]
    return [*modes, ("other_baseline", other[0], AUTOREGRESSIVE), ("other_medusa", *other)] if other else modes


def parted_run(result: PromptResult) -> Generation:
    """The first measured run whose output is not the one without drafts; there has to be one."""
    return next(run for run in result.medusa if first_divergence(result.baseline[0], run) is not None)


def continuations(result: PromptResult) -> tuple[list[int], list[int], list[int]]:
    """The text up to where the outputs without and with drafts part, and how each goes on, as far as both do."""
    baseline, run = result.baseline[0], parted_run(result)
    at = first_divergence(baseline, run)
    length = min(len(baseline.tokens), len(run.tokens))
    return [*result.input_ids, *baseline.tokens[:at]], baseline.tokens[at:length], run.tokens[at:length]


def _most_nodes(way: Tree | Drafter) -> int:
    """Of a step."""
    return max(tree.num_nodes for tree in ([way] if isinstance(way, Tree) else way.trees))


def _judge(
    engine: ScoringEngine, measured: Tree | Drafter, ways: Mapping[str, Tree | Drafter], numbered: Mapping[int, PromptResult],
    sampler: Callable[[int], Sampler | None],
) -> float:  # fmt: skip
    """Fill in every prompt's verdicts; returns the tolerance, which is the noise of steps as large as the measured drafts'.

    Where it is none, as products of integers have it, outputs that part are a mismatch, however small the gap. Other drafts are
    judged by the noise of their own steps.

    Args:
        engine: what ran.
        measured: the drafts that are measured.
        ways: the others, by name.
        numbered: prompts by their number.
        sampler: of a prompt's number, what its tokens were drawn with.
    """
    results = list(numbered.values())
    for index, result in numbered.items():
        result.divergence = _divergence(engine, result, result.medusa, sampler(index))
    tolerance = _noise(engine, measured, results, [bool(result.divergence) for result in results])
    for result in results:
        result.verdict = verdict(result.divergence, tolerance)
    for name, way in ways.items():
        found = [_divergence(engine, result, result.ways[name], sampler(index)) for index, result in numbered.items()]
        noise = _noise(engine, way, results, list(map(bool, found))) if any(found) else 0.0
        for result, divergence in zip(results, found, strict=True):
            result.way_verdicts[name] = verdict(divergence, noise)
    return tolerance


def _divergence(
    engine: ScoringEngine, result: PromptResult, runs: Sequence[Generation], sampler: Sampler | None
) -> Divergence | None:
    """Where the first of the runs that does so parts from the one without drafts."""
    found = (explain(engine, result.input_ids, result.baseline[0], run, sampler) for run in runs)
    return next(filter(None, found), None)


def _noise(
    engine: ScoringEngine, way: Tree | Drafter, results: Sequence[PromptResult], parted: Sequence[bool]
) -> float:
    """The largest over some prompts, and over the whole answers of those whose outputs part."""
    noise, nodes = 0.0, _most_nodes(way)
    for number, (result, has_parted) in enumerate(zip(results, parted, strict=True)):
        if has_parted or number < NOISE_PROMPTS:
            answer = result.baseline[0].tokens
            answer = answer if has_parted else answer[:NOISE_TOKENS]
            noise = max(noise, logit_noise(engine, result.input_ids, answer, nodes))
    return noise
