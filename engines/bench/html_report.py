"""A run's report as one page that needs nothing else: no network, no script; light and dark, wide and narrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from medusa_export.core.text.words import counted
from medusa_export.engines.bench.report import QUANTILES, SPEEDS, foretold_row, paired_line, sweep_rows, whole_interval
from medusa_export.engines.bench.speeds import interval_text, times_text
from medusa_export.engines.bench.wording import BASELINE, compared, measured_kind, sources
from medusa_export.engines.tuning.picture import positions
from medusa_export.heads.trees.tree import Tree

TEMPLATE = "report.html.jinja"
SHOWN_TOP = (1, 2, 3, 5, 10)
NO_INTERVAL = "too few prompts for an interval"
COLUMN, ROW, MARGIN = 54, 66, 20  # of the tree's picture, in pixels


@dataclass(frozen=True)
class Scale:
    """Places on an axis from 0 to ``top``, in percent."""

    top: float

    def at(self, value: float) -> float:
        """Where a value lies; what is off the axis lies at its end."""
        return round(100 * min(max(value / self.top, 0.0), 1.0), 2)


def render(report: Mapping[str, Any]) -> str:
    """The page.

    Args:
        report: what ``medusa-run --report`` writes.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("medusa_export.engines.bench", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    shown = [row[key] for row in report["categories"] for key in ("decode_speedup", "speedup") if row[key]]
    shown += [row["decode_speedup_ci95"][1] for row in report["categories"] if row["decode_speedup_ci95"]]
    tree = Tree.from_choices(report["tree"]["medusa_choices"])
    return environment.get_template(TEMPLATE).render(
        report=report,
        verdict=verdict(report),
        speed_scale=Scale(1.05 * max(1.0, *shown)),
        steps=_steps(report["accepted"]),
        latencies=_latencies(report["latency_ms"]),
        tree=_tree_picture(tree, report["path_shares"]),
        drafts=_drafts(report, tree),
        has_tree=measured_kind(report) == "heads",
        foretold=foretold_row(report),
        counted=counted,
        quantiles=[f"{quantile:.0%}" for quantile in QUANTILES],
        shown_top=SHOWN_TOP,
        paired_line=paired_line,
        interval_text=interval_text,
        times_text=times_text,
        speeds=SPEEDS,
        rates=[("decoding", report["decode_tokens_per_second"]), ("whole answers", report["tokens_per_second"])],
        intervals={
            "decoding": _interval_line(report["decode_speedup"]["ci95"]),
            "whole": _interval_line(whole_interval(report)),
        },
        sweeps=[sweep_rows(name, rows) for name, rows in report["sweeps"].items()],
    )


def verdict(report: Mapping[str, Any]) -> dict[str, str]:
    """What the run says, in a line: "good", "even" or "bad" by whole answers, which is what a user waits for, and the text."""
    if report["failures"]:
        return {"kind": "bad", "text": "; ".join(report["failures"][:3])}
    if report["decode_speedup"]["median"] is None:
        return {"kind": "even", "text": f"every answer is one token, so nothing was decoded; {_same(report['parity'])}"}
    decoding, whole = times_text(report["decode_speedup"]["median"]), times_text(report["speedup"]["median"])
    if measured_kind(report) == BASELINE:
        noise = (
            f"no drafts in either run, so {decoding} in decoding and {whole} in whole answers are the machine's noise"
        )
        return {"kind": "even", "text": f"{noise}; {_same(report['parity'])}"}
    kind, word = _speed_verdict(whole_interval(report))
    return {
        "kind": kind,
        "text": f"{word} {compared(report)}: decoding {decoding}, whole answers {whole}; {_same(report['parity'])}",
    }


def _speed_verdict(interval: Sequence[float] | None) -> tuple[str, str]:
    """How it is coloured, and what comes before the figures."""
    if interval is None:
        return "even", "too few prompts to say whether it is faster"
    low, high = interval
    if low > 1:
        return "good", "faster"
    return ("bad", "slower") if high < 1 else ("even", "no clear difference in speed")


def _same(parity: Mapping[str, Any]) -> str:
    """What became of the outputs."""
    if not parity["lossless"]:
        return "not lossless: typical acceptance changes what is drawn"
    same = f"the same output on {parity['exact']} of {counted(parity['prompts'], 'prompt')}"
    if not parity["ties"]:
        return same
    return f"{same}, and {parity['ties']} that {'parts' if parity['ties'] == 1 else 'part'} at a tie"


def _interval_line(interval: Sequence[float] | None) -> str:
    return NO_INTERVAL if interval is None else f"95%: {interval_text(interval)}"


def _drafts(report: Mapping[str, Any], tree: Tree) -> dict[str, Any]:
    """What drafted, and every kind of drafts where several were run."""
    depth = f", {tree.depth} deep" if measured_kind(report) == "heads" else ""
    rows = [{**row, "sources": sources(report, row)} for row in report["drafts"]]
    return {"line": f"drafts from: {sources(report)}{depth}", "rows": rows if len(rows) > 1 else []}


def _steps(accepted: list[int]) -> list[dict[str, Any]]:
    """Per number of tokens N: the share of steps that yielded N, and how many of those that reached N - 1 reached N."""
    total = sum(accepted) or 1
    reached = [sum(accepted[index:]) for index in range(len(accepted))]
    rates = [None, *(after / before if before else 0.0 for before, after in pairwise(reached))]
    return [{"tokens": index + 1, "share": count / total, "rate": rates[index]} for index, count in enumerate(accepted)]


def _latencies(latency: Mapping[str, Mapping[str, list[float]]]) -> list[dict[str, Any]]:
    """Rows of quantiles with their places on an axis that the rows of a name share."""
    rows = []
    for name in ("token", "step", "prefill"):
        found = {mode: latency[mode][name] for mode in latency if latency[mode][name]}
        scale = Scale(1.05 * max((values[-1] for values in found.values()), default=1.0) or 1.0)
        for mode, values in found.items():
            rows.append({"name": name, "mode": mode, "values": values, "places": [scale.at(value) for value in values]})
    return rows


def _tree_picture(tree: Tree, shares: Sequence[float]) -> dict[str, Any]:
    """Coordinates of the nodes, and of the edges with how often their path is the true one, where that is known."""
    places = positions(tree)
    points = {choice: (MARGIN + COLUMN * x, MARGIN - ROW * y) for choice, (x, y) in places.items()}
    edges = [
        {"from": points[choice[:-1]], "to": points[choice], "share": shares[index] if shares else None}
        for index, choice in enumerate(tree.choices)
    ]
    nodes = [{"x": x, "y": y, "label": str(choice[-1]) if choice else ""} for choice, (x, y) in points.items()]
    width = 2 * MARGIN + max(x for x, _ in points.values()) - MARGIN
    return {"edges": edges, "nodes": nodes, "width": width, "height": 2 * MARGIN + ROW * tree.depth}
