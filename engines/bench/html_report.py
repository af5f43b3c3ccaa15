"""A run's report as one page that needs nothing else: no network, no script; light and dark, wide and narrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from medusa_export.engines.bench.report import QUANTILES, SPEEDS, paired_line, sweep_rows, whole_interval
from medusa_export.engines.bench.speeds import interval_text, times_text
from medusa_export.engines.tuning.picture import positions
from medusa_export.heads.trees.tree import Tree

TEMPLATE = "report.html.jinja"
SHOWN_TOP = (1, 2, 3, 5, 10)
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
        depth=tree.depth,
        quantiles=[f"{quantile:.0%}" for quantile in QUANTILES],
        shown_top=SHOWN_TOP,
        paired_line=paired_line,
        interval_text=interval_text,
        times_text=times_text,
        speeds=SPEEDS,
        rates=[("decoding", report["decode_tokens_per_second"]), ("whole answers", report["tokens_per_second"])],
        whole_interval=whole_interval(report),
        sweeps=[sweep_rows(name, rows) for name, rows in report["sweeps"].items()],
    )


def verdict(report: Mapping[str, Any]) -> dict[str, str]:
    """What the run says, in a line: "good", "even" or "bad" by whole answers, which is what a user waits for, and the text."""
    parity, speed = report["parity"], report["speedup"]
    low, high = speed["ci95"]
    decoding, whole = times_text(report["decode_speedup"]["median"]), times_text(speed["median"])
    same = f"the same output on {parity['exact']} of {parity['prompts']} prompts"
    if not parity["lossless"]:
        same = "not lossless: typical acceptance changes what is drawn"
    if parity["ties"]:
        same += f", and {parity['ties']} that part at a tie"
    if report["failures"]:
        return {"kind": "bad", "text": "; ".join(report["failures"][:3])}
    if low > 1:
        return {"kind": "good", "text": f"faster with Medusa: decoding {decoding}, whole answers {whole}; {same}"}
    kind, word = ("bad", "slower") if high < 1 else ("even", "no clear difference in speed")
    return {"kind": kind, "text": f"{word} with Medusa: decoding {decoding}, whole answers {whole}; {same}"}


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
