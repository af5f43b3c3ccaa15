"""What a run found, by name: the names are those of docs/trust.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medusa_export.core.text.prompts import Prompt
from medusa_export.core.text.tokenizer import TOKENIZER_FILES
from medusa_export.core.text.words import counted
from medusa_export.engines.bench.runner import RunResult
from medusa_export.engines.bench.wording import compared
from medusa_export.engines.decoding.drafters import Drafter
from medusa_export.engines.decoding.protocols import Generation
from medusa_export.engines.verify.expectation import Expectation, expectation_findings, first_draft_findings, foretell
from medusa_export.engines.verify.run_checks import choice_findings, end_findings, prompt_findings, sampled_tree_error
from medusa_export.engines.verify.selfcheck import bound_of
from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.trees.acceptance import ACCEPTANCE_FILE, Acceptance
from medusa_export.heads.trees.tree import Tree

Named = tuple[str, str]


def expectation_of(engine_dir: Path, tree: Tree, result: RunResult) -> Expectation | None:
    """What the engine's own acceptance.json predicts for the run's prompts; None where nothing was counted.

    Args:
        engine_dir: where acceptance.json is.
        tree: that the run used.
        result: the run, for the categories of its prompts.
    """
    path = engine_dir / ACCEPTANCE_FILE
    if not path.is_file():
        return None
    return foretell(Acceptance.load(path), tree, [prompt.category for prompt in result.prompts])


def run_findings(report: dict[str, Any], info: EngineInfo, min_speedup: float | None) -> Iterator[Named]:
    """Parity, speed, and the comparison with the checkpoint.

    Args:
        report: body of report.json.
        info: of the engine.
        min_speedup: least factor of whole answers over plain decoding; None asks for none.
    """
    for row in report["drafts"]:
        if row["mismatches"]:
            parted = f"outputs of {counted(row['mismatches'], 'prompt')} differ {compared(report, row)}"
            yield "parity", f"{parted} by more than numerical noise"
    speed = report["speedup"]["median"]
    if min_speedup is not None and speed < min_speedup:
        yield "speed-up", f"speed-up {speed:.3f} of whole answers is below --min-speedup {min_speedup}"
    found, bound = report["reference"], bound_of(info)
    if found and not (found["kl_mean"] <= bound.max_kl and found["greedy_agreement"] >= bound.min_agreement):  # NaN too
        yield (
            "reference",
            f"the engine is not the checkpoint: KL {found['kl_mean']:.3g} (at most {bound.max_kl}), "
            f"{found['greedy_agreement']:.1%} equal tokens (at least {bound.min_agreement:.0%})",
        )


def step_findings(engine: Any, tree: Tree, result: RunResult, seed: int) -> tuple[dict[str, float] | None, list[Named]]:
    """Tree steps against their paths on a sample of steps; nothing where a runtime decodes whole answers itself.

    Args:
        engine: what ran.
        tree: that it used.
        result: the run: its prompts and plain answers are what is sampled.
        seed: of the sample.
    """
    if not hasattr(engine, "tree_logits") or not tree.max_draft_len:
        return None, []
    texts = [(prompt.input_ids, prompt.baseline[0].tokens) for prompt in result.prompts]
    error, bound = sampled_tree_error(engine, tree, texts, seed)
    measured = {"error": error, "bound": bound}
    if error <= bound:  # NaN is not
        return measured, []
    message = f"a tree step differs from its paths by {error:.3g} logits; the engine's noise allows {bound:.3g}"
    return measured, [("tree-logits", message)]


def accepted_findings(
    way: Tree | Drafter, result: RunResult, expected: Expectation | None, *, ignore: bool
) -> list[Named]:
    """What the run says of the heads.

    Args:
        way: that drafted. Where it is one tree, its tokens per step are the heads'; otherwise the text has a share in them.
        result: the run.
        expected: what was foretold of the engine's tree; None where nothing was.
        ignore: the prompts are of another kind than those that were counted.
    """
    runs = [prompt.medusa[0] for prompt in result.prompts]
    if not isinstance(way, Tree):
        messages = first_draft_findings([run.first_drafts for run in runs if run.first_drafts])
    elif way.max_draft_len:
        messages = expectation_findings(expected, [tokens for run in runs for tokens in run.accepted], ignore=ignore)
    else:
        messages = []
    return [("tokens-per-step", message) for message in messages]


def _different(baseline: Generation, medusa: Generation) -> list[Generation]:
    """Outputs that are judged: an equal one once."""
    is_equal = (baseline.tokens, baseline.finish_reason) == (medusa.tokens, medusa.finish_reason)
    return [baseline] if is_equal else [baseline, medusa]


def reference_findings(
    engine: Any, checkpoint: Path, prompts: Sequence[Prompt], result: RunResult, max_new_tokens: int
) -> list[Named]:
    """Prompts, tokens and ends against the checkpoint's own files; of greedy runs.

    Args:
        engine: what ran.
        checkpoint: Hugging Face directory.
        prompts: as they were given.
        result: the run, in their order.
        max_new_tokens: most tokens of an answer.
    """
    runs = [(p.prompt_id, p.input_ids, run) for p in result.prompts for run in _different(p.baseline[0], p.medusa[0])]
    found = [("greedy-choice", line) for line in choice_findings(engine, runs, result.tolerance)]
    found += [("answer-end", line) for line in end_findings(checkpoint, runs, max_new_tokens)]
    if any((checkpoint / name).is_file() for name in TOKENIZER_FILES[:3]):
        encoded = [
            (p.prompt_id, prompt.messages, p.input_ids) for p, prompt in zip(result.prompts, prompts, strict=True)
        ]
        found += [("prompt", line) for line in prompt_findings(checkpoint, encoded)]
    return found
