"""report.json and the table that people read, from one run's results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from medusa_export.core.text.words import counted
from medusa_export.engines.bench.runner import PromptResult, RunResult
from medusa_export.engines.bench.speeds import (
    DECODING,
    FEWEST,
    MODES,
    WHOLE,
    TimedPart,
    interval_text,
    rate_text,
    speedup,
    speedup_interval,
    times_text,
    tokens_per_second,
    with_interval,
)
from medusa_export.engines.bench.wording import FORETOLD, measured_kind, sources
from medusa_export.engines.measure.machine import device_name, hardware, versions
from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.trees.tree import Tree

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SHOWN_FINDINGS, SHOWN_DIVERGENCES = 5, 5
SPEEDS = {"decoding": "decode_speed", "whole answers": "speed"}  # of another engine, and their keys


def build_report(
    result: RunResult,
    tree: Tree,
    info: EngineInfo,
    arguments: dict[str, Any],
    reference: dict[str, Any] | None = None,
    *,
    num_gpus: int = 1,
) -> dict[str, Any]:
    """The report as JSON-ready data. What is called decode leaves the prefill out; step_ms is one decode step.

    Args:
        num_gpus: that the engine runs on, if it runs on any.
    """
    prompts = result.prompts
    verdicts = [prompt.verdict for prompt in prompts]
    steps = {mode: _step_ms(prompts, mode) for mode in MODES}
    return {
        "parity": {
            "prompts": len(prompts),
            "exact": verdicts.count("exact"),
            "ties": verdicts.count("tie"),
            "mismatches": verdicts.count("mismatch"),
            "lossless": not arguments.get("typical", False),
            "logit_tolerance": result.tolerance,
            "divergences": [
                {"prompt": prompt.prompt_id, "verdict": prompt.verdict, **prompt.divergence.as_dict()}
                for prompt in prompts
                if prompt.divergence
            ],
        },
        **_speed(prompts, int(arguments.get("seed", 0))),
        "drafts": _drafts(prompts, arguments.get("drafts", "heads")),
        "step_ms": {mode: round(steps[mode][0], 4) for mode in MODES},
        "overhead_ms": {mode: round(steps[mode][1], 4) for mode in MODES},
        "categories": _categories(prompts, int(arguments.get("seed", 0))),
        "accepted": _accepted(prompts),
        "counted_drafts": _counted_drafts(prompts),
        "latency_ms": {mode: _latency(prompts, mode) for mode in MODES},
        "prompts": [_prompt(prompt) for prompt in prompts],
        "reference": reference,
        "comparison": None,
        "sweeps": {},
        "stopped": None,
        "expected": [],
        "tree_logits": None,
        "foretold": None,
        "findings": [],
        "tree": {"max_draft_len": tree.max_draft_len, "medusa_choices": [list(choice) for choice in tree.choices]},
        "engine": {"backend": info.backend, "precision": info.precision, "source": info.source},
        "hardware": hardware(),
        "device": device_name(info, num_gpus),
        "versions": versions(),
        "arguments": arguments,
    }


def _speed(prompts: Sequence[PromptResult], seed: int) -> dict[str, Any]:
    """Throughputs, tokens per step and speed-ups of decoding and of whole answers, with a percentile bootstrap over prompts."""
    decoding, per_step = speedup(prompts, DECODING), tokens_per_step(prompts)
    return {
        "decode_speedup": {"median": _rounded(decoding), "ci95": speedup_interval(prompts, DECODING, seed)},
        "speedup": {
            "median": _rounded(speedup(prompts, WHOLE)),
            "ci95": speedup_interval(prompts, WHOLE, seed, fewest=1),
        },
        "tokens_per_step": round(per_step, 4),
        "step_efficiency": _rounded(decoding and decoding / per_step),
        "decode_tokens_per_second": _per_second(prompts, DECODING),
        "tokens_per_second": _per_second(prompts, WHOLE),
    }


def _per_second(prompts: Sequence[PromptResult], part: TimedPart) -> dict[str, float | None]:
    found = tokens_per_second(prompts, part)
    return {mode: _rounded(found.get(mode), 3) for mode in MODES}


def _rounded(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)


def tokens_per_step(prompts: Sequence[PromptResult]) -> float:
    """Mean tokens that a decode step with the tree adds to the output, the prefill's one aside; 1 where no step ran."""
    steps = sum(len(prompt.medusa[0].accepted) for prompt in prompts)
    return sum(prompt.tokens("medusa") - 1 for prompt in prompts) / steps if steps else 1.0


def _step_ms(prompts: Sequence[PromptResult], mode: str) -> tuple[float, float]:
    """Medians over all runs of the mean decode step, and of what of it lies outside the backend."""
    runs = [run for prompt in prompts for run in getattr(prompt, mode) if run.accepted]
    if not runs:
        return 0.0, 0.0
    whole = median(run.decode_ms / len(run.accepted) for run in runs)
    outside = median((run.decode_ms - run.backend_ms) / len(run.accepted) for run in runs)
    return whole, outside


def _categories(prompts: Sequence[PromptResult], seed: int) -> list[dict[str, Any]]:
    rows = []
    for category in sorted({prompt.category for prompt in prompts}):
        group = [prompt for prompt in prompts if prompt.category == category]
        rows.append(
            {
                "category": category,
                "prompts": len(group),
                "decode_speedup": _rounded(speedup(group, DECODING)),
                "decode_speedup_ci95": speedup_interval(group, DECODING, seed),
                "speedup": _rounded(speedup(group, WHOLE)),
                "speedup_ci95": speedup_interval(group, WHOLE, seed),
                "tokens_per_step": round(tokens_per_step(group), 4),
                "exact": sum(prompt.verdict == "exact" for prompt in group),
            }
        )
    return rows


def _drafts(prompts: Sequence[PromptResult], measured: str) -> list[dict[str, Any]]:
    """Every drafter's decoding against none, on all prompts, the prefill not counted; the one that is measured first."""
    found = []
    for name in (measured, *prompts[0].ways):
        mode = "medusa" if name == measured else name
        verdicts = [prompt.verdict if name == measured else prompt.way_verdicts[name] for prompt in prompts]
        tokens = sum(prompt.decoded_tokens(mode) for prompt in prompts)
        steps = sum(len(prompt.runs(mode)[0].accepted) for prompt in prompts)
        found.append(
            {
                "drafts": name,
                "decode_speedup": _rounded(speedup(prompts, DECODING, mode)),
                "tokens_per_step": round(tokens / steps, 4) if steps else 1.0,
                "equal_outputs": verdicts.count("exact"),
                "ties": verdicts.count("tie"),
                "mismatches": verdicts.count("mismatch"),
            }
        )
    return found


def drafts_line(rows: Sequence[dict[str, Any]]) -> str:
    """All drafters in one line: "heads 1.08x, text 1.21x, both 1.38x"."""
    return ", ".join(f"{row['drafts']} {times_text(row['decode_speedup'])}" for row in rows)


def _accepted(prompts: Sequence[PromptResult]) -> list[int]:
    """How many steps yielded 1, 2, 3 ... tokens."""
    counts = Counter(tokens for prompt in prompts for tokens in prompt.medusa[0].accepted)
    return [counts[tokens] for tokens in range(1, max(counts, default=0) + 1)]


def _counted_drafts(prompts: Sequence[PromptResult]) -> dict[str, int] | None:
    """As the runtime counts them itself, over all measured runs; None where it does not."""
    counted = [run.counted_drafts for prompt in prompts for run in prompt.medusa if run.counted_drafts]
    if not counted:
        return None
    accepted, drafts = (sum(column) for column in zip(*counted, strict=True))
    return {"accepted": accepted, "drafts": drafts}


def _latency(prompts: Sequence[PromptResult], mode: str) -> dict[str, list[float]]:
    """Quantiles over all runs: of a run's mean time a token and a step, and of the prefill; see QUANTILES."""
    runs = [run for prompt in prompts for run in getattr(prompt, mode)]
    values = {
        "token": [run.decode_ms / (len(run.tokens) - 1) for run in runs if len(run.tokens) > 1],
        "step": [run.decode_ms / len(run.accepted) for run in runs if run.accepted],
        "prefill": [run.prefill_ms for run in runs],
    }
    return {
        name: [round(float(value), 3) for value in np.quantile(found, QUANTILES)] if found else []
        for name, found in values.items()
    }


def _prompt(prompt: PromptResult) -> dict[str, Any]:
    return {
        "prompt": prompt.prompt_id,
        "category": prompt.category,
        "input_tokens": len(prompt.input_ids),
        "tokens": {mode: prompt.tokens(mode) for mode in MODES},
        "total_ms": {mode: round(prompt.total_ms(mode), 3) for mode in MODES},
        "decode_ms": {mode: round(prompt.decode_ms(mode), 3) for mode in MODES},
        "tokens_per_step": round(tokens_per_step([prompt]), 4),
        "verdict": prompt.verdict,
    }


def print_report(report: dict[str, Any], console: Console) -> None:
    """The readable form: the summary table, then categories, then what needs explaining.

    Args:
        report: body of report.json.
        console: that takes no text for markup: ids and categories may hold brackets.
    """
    from rich.table import Table

    title = f"{report['engine']['precision']} on {report['device']}"
    table = Table(title=title, title_justify="left", show_header=False)
    for name, text in _summary(report).items():
        table.add_row(name, text)
    console.print(table)
    console.print(_category_table(report["categories"]))
    for name, sweep in report["sweeps"].items():
        head, *lines = sweep_rows(name, sweep)
        swept = Table(*head, title="decoding alone, prefills not counted", title_justify="left")
        for line in lines:
            swept.add_row(*line)
        console.print(swept)
    if report["comparison"]:
        console.print(_comparison_table(report["comparison"]))
    for parted in divergence_lines(report["parity"]["divergences"]):
        console.print(parted)
    for failed in finding_lines(report):
        console.print(failed, style="bold red")


def _summary(report: Mapping[str, Any]) -> dict[str, str]:
    """Rows of the first table."""
    step, stopped = report["step_ms"], report["stopped"]
    left = f" of {stopped['of']}, then stopped" if stopped else ""
    rows = {"prompts": f"{report['parity']['prompts']}{left}"}
    rows |= {f"tokens/s, {name}": text for name, text in rate_texts(report).items()}
    rows |= {f"speed-up, {name} (95% CI)": text for name, text in speedup_texts(report).items()}
    rows["tokens per step"] = f"{report['tokens_per_step']:.2f}, drafts from: {sources(report)}"
    if foretold := foretold_row(report):
        rows[foretold[0]] = foretold[1]
    if accepted := report["counted_drafts"]:
        rows["drafts accepted, by the runtime"] = f"{accepted['accepted']} of {accepted['drafts']}"
    if len(report["drafts"]) > 1:
        rows["speed-up by kind of drafts, decoding"] = drafts_line(report["drafts"])
    rows["step, without / with"] = f"{step['baseline']:.1f} / {step['medusa']:.1f} ms"
    rows["parity"] = _parity_line(report["parity"])
    if reference := report["reference"]:
        rows["against the checkpoint"] = _reference_line(reference)
        if reference["parted"]:
            rows["where outputs part, drafts' likelihood"] = paired_line(reference["parted"])
    return rows


def foretold_row(report: Mapping[str, Any]) -> tuple[str, str] | None:
    """What acceptance.json predicts and its name; None where it predicts nothing of such drafts."""
    found, name = report["foretold"], FORETOLD.get(measured_kind(report))
    if not found or not name:
        return None
    low, high = found["interval"]
    return name, f"{found['tokens_per_step']:.2f} ({low:.2f} .. {high:.2f})"


def divergence_lines(divergences: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where outputs part, at most five of them, mismatches first."""
    lines = []
    for item in sorted(divergences, key=lambda item: bool(item["verdict"] == "tie"))[:SHOWN_DIVERGENCES]:
        gap = "an output ended early" if item["logit_gap"] is None else f"logit gap {item['logit_gap']:.2g}"
        lines.append(f"{item['verdict']}: prompt {item['prompt']} at token {item['position']}, {gap}")
    more = len(divergences) - len(lines)
    return [*lines, f"and {more} more, in the report (--report)"] if more else lines


def speedup_texts(report: Mapping[str, Any]) -> dict[str, str]:
    """Both speed-ups with their intervals, by what they are of."""
    decoding, whole = report["decode_speedup"], report["speedup"]
    return {
        "decoding": with_interval(decoding["median"], decoding["ci95"]),
        "whole answers": with_interval(whole["median"], whole_interval(report)),
    }


def rate_texts(report: Mapping[str, Any]) -> dict[str, str]:
    """Tokens a second without and with drafts, by what they are of."""
    return {
        "decoding": _rates(report["decode_tokens_per_second"]),
        "whole answers": _rates(report["tokens_per_second"]),
    }


def _rates(rates: Mapping[str, float | None]) -> str:
    without, drafted = rates["baseline"], rates["medusa"]
    return "-" if without is None or drafted is None else f"{without:.1f} without, {drafted:.1f} with"


def _category_table(categories: Sequence[dict[str, Any]]) -> Table:
    """Fits 80 columns with categories of 14 letters; the interval of whole answers is in the JSON and on the page."""
    from rich.table import Table

    table = Table("category", "prompts", "decoding (95% CI)", "whole\nanswers", "tokens\nper step", "exact")
    for row in categories:
        decoding = with_interval(row["decode_speedup"], row["decode_speedup_ci95"])
        cells = (decoding, times_text(row["speedup"]), f"{row['tokens_per_step']:.2f}")
        table.add_row(row["category"], str(row["prompts"]), *cells, str(row["exact"]))
    return table


def whole_interval(report: Mapping[str, Any]) -> list[float] | None:
    """Of the speed-up of whole answers over all prompts; None where there are too few."""
    found: list[float] = report["speedup"]["ci95"]
    return found if report["parity"]["prompts"] >= FEWEST else None


def finding_lines(report: dict[str, Any]) -> list[str]:
    """Findings by name, at most five of each."""
    by_name: dict[str, list[str]] = {}
    for finding in report["findings"]:
        by_name.setdefault(finding["name"], []).append(finding["message"])
    lines = []
    for name, messages in by_name.items():
        lines += [f"FAILED {name}: {message}" for message in messages[:SHOWN_FINDINGS]]
        if len(messages) > SHOWN_FINDINGS:
            lines.append(f"FAILED {name}: ... and {len(messages) - SHOWN_FINDINGS} more")
    return lines


def sweep_rows(name: str, sweep: Sequence[dict[str, Any]]) -> Sequence[tuple[str, ...]]:
    """A sweep as a table, its head first; ``name`` is "batch" or "length"."""
    if name == "batch":
        head = (
            "sequences at once",
            "tokens/s without",
            "tokens/s with",
            "speed-up",
            "tokens per step",
            "equal outputs",
        )
        return [head] + [
            (
                f"{row['batch']}", *(rate_text(row["tokens_per_second"][mode]) for mode in MODES),
                times_text(row["speedup"]), f"{row['tokens_per_step']:.2f}", f"{row['equal_outputs']} of {row['prompts']}",
            )
            for row in sweep
        ]  # fmt: skip
    return [("prompt tokens", "speed-up", "95%", "tokens per step")] + [
        (
            f"{row['prompt_length']}", times_text(row["speedup"]), interval_text(row["speedup_ci95"]),
            "-" if row["tokens_per_step"] is None else f"{row['tokens_per_step']:.2f}",
        )
        for row in sweep
    ]  # fmt: skip


def _comparison_table(found: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=f"against {found['precision']}", title_justify="left", show_header=False)
    perplexity = found["perplexity"]
    table.add_row("equal greedy tokens", f"{found['greedy_agreement']:.1%} of {found['positions']}")
    table.add_row("equal outputs", f"{found['equal_outputs']} of {found['prompts']}")
    table.add_row("KL of next tokens", f"{found['kl_mean']:.3g} nats")
    table.add_row(
        "perplexity of the other's answers",
        f"{perplexity['engine']:.3f} (under the other itself {perplexity['other']:.3f})",
    )
    for name, key in SPEEDS.items():
        speed = found[key]
        both = f"{times_text(speed['without_medusa'])} / {times_text(speed['with_medusa'])}"
        table.add_row(f"{name}, both without / both with", both)
        table.add_row(f"{name}, this one with, the other without", times_text(speed["ours_with_to_other_without"]))
    for row in found["paired"]:
        table.add_row(row["measure"], paired_line(row))
    return table


def paired_line(row: dict[str, Any]) -> str:
    """A paired difference in words."""
    if row["ci95"] is None:
        return f"{row['difference']:+.3g} on one prompt, too few to tell a difference"
    if not row["difference"] and not row["detectable"]:
        return f"equal on all {row['prompts']} prompts"
    low, high = row["ci95"]
    text = f"{row['difference']:+.3g} ({low:+.3g} .. {high:+.3g}) over {row['prompts']} prompts"
    if row["differs"]:
        return text
    return f"{text}: no difference seen ({row['detectable']:.2g} would have been, 4 times out of 5)"


def _parity_line(parity: dict[str, Any]) -> str:
    if not parity["lossless"]:
        return f"not lossless (typical acceptance): {parity['exact']} of {counted(parity['prompts'], 'output')} happen to be equal"
    line = f"{parity['exact']} exact, {counted(parity['ties'], 'tie')}, {counted(parity['mismatches'], 'mismatch')}"
    return line + f" (tolerance {parity['logit_tolerance']:.1g} logits)"


def _reference_line(reference: dict[str, Any]) -> str:
    perplexity = reference["perplexity"]
    return (
        f"{reference['greedy_agreement']:.1%} of tokens, KL {reference['kl_mean']:.2g} nats, "
        f"perplexity {perplexity['engine']:.3f} (checkpoint {perplexity['checkpoint']:.3f})"
    )
