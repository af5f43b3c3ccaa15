"""The roofline compared with published results: a table for docs/gpu-estimates.md, and a plot.

    python benchmarks/gpu_estimates.py --plot docs/gpu-estimates.svg

Needs no GPU. With ``--measured gpu/gpu.json`` of benchmarks/gpu.py, its measured curves stand beside their estimates too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from gpu_published import NODES, PAST, POINTS, Point

from medusa_export.heads.roofline.step import DEFAULTS, Assumptions, corners, step_ms


@dataclass(frozen=True)
class Held:
    """A published figure beside its estimates.

    Attributes:
        estimate: with the assumptions of the software that was measured.
        low, high: over the corners of these assumptions.
        graph: the same on TensorRT-LLM, by the defaults.
    """

    point: Point
    estimate: float
    low: float
    high: float
    graph: float

    @property
    def error(self) -> float:
        """Of the estimate, as a part of what was published."""
        return self.estimate / self.point.published - 1


def hold(point: Point) -> Held:
    """Estimate a published figure."""
    every = estimates(point, corners(point.assumptions))
    (graph,) = estimates(point, DEFAULTS)
    return Held(point, float(every[0]), float(every.min()), float(every.max()), float(graph))


def estimates(point: Point, assumptions: Assumptions) -> Any:
    """The figure under each of the assumptions.  # [S]"""
    plain = step_ms(point.deployment, 1, 1, PAST, assumptions=assumptions)
    if point.what == "tokens/s":
        return np.atleast_1d(1e3 / plain)
    return np.atleast_1d(step_ms(point.deployment, 1, NODES, PAST, medusa=True, assumptions=assumptions) / plain)


def markdown(held: Sequence[Held]) -> str:
    """The table of docs/gpu-estimates.md."""
    lines = [
        "| model | GPU | figure | published | estimate | off by | range | TensorRT-LLM | source |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in held:
        point, digits = each.point, 0 if each.point.what == "tokens/s" else 2
        gpus = f"{point.tp} x {point.gpu.name}" if point.tp > 1 else point.gpu.name
        published = f"{point.published:.{digits}f}{' (derived)' * point.derived}"
        numbers = (f"{value:.{digits}f}" for value in (each.low, each.high))
        lines.append(
            f"| {point.model} | {gpus} | {point.what} | {published} | {each.estimate:.{digits}f} | {each.error:+.0%} | "
            f"{' .. '.join(numbers)} | {each.graph:.{digits}f} | {point.source} |"
        )
    return "\n".join(lines)


def speedups(held: Sequence[Held]) -> str:
    """Speed-ups that follow from published tokens per step and the estimate, where both are published."""
    lines = [
        "| model | GPU | tokens per step | published | estimate | off by | range |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in held:
        point = each.point
        if point.tokens_per_step:
            tokens = point.tokens_per_step
            error = tokens / each.estimate / point.speedup - 1
            lines.append(
                f"| {point.model} | {point.gpu.name} | {tokens:.2f} | {point.speedup:.2f} | {tokens / each.estimate:.2f} | "
                f"{error:+.0%} | {tokens / each.high:.2f} .. {tokens / each.low:.2f} |"
            )
    return "\n".join(lines)


def measured_table(body: Mapping[str, Any]) -> str:
    """Curves of benchmarks/gpu.py beside their estimates, where it found the GPU in the table."""
    lines = [
        "| part | nodes | measured ms | estimate ms | ratio, measured | ratio, estimate |",
        "|---|---|---|---|---|---|",
    ]
    for name, part in body["parts"].items():
        for row in part.get("costs", {}).get("estimate", ()):
            cells = (row[key] for key in ("measured_ms", "estimate_ms", "measured_ratio", "estimate_ratio"))
            lines.append(f"| {name} | {row['nodes']} | {' | '.join(f'{value:.2f}' for value in cells)} |")
    return "\n".join(lines)


def draw(path: Path, held: Sequence[Held]) -> None:
    """Published against estimated overheads, with their ranges."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "gpu-estimates"  # the same file every time
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    ends = (1.0, 2.5)
    axes.plot(ends, ends, color="gray", linewidth=0.8)
    axes.fill_between(
        ends, [0.85 * end for end in ends], [1.15 * end for end in ends], color="gray", alpha=0.15, label="within 15 %"
    )
    overheads = [each for each in held if each.point.what == "overhead"]
    for source in dict.fromkeys(each.point.source for each in overheads):
        chosen = [each for each in overheads if each.point.source == source]
        low, high = ([abs(getattr(each, end) - each.estimate) for each in chosen] for end in ("low", "high"))
        x = [each.point.published for each in chosen]
        axes.errorbar(x, [each.estimate for each in chosen], yerr=(low, high), fmt="o", capsize=3, label=source)
        for each, place in zip(chosen, x, strict=True):
            axes.annotate(
                each.point.model, (place, each.estimate), xytext=(4, -10), textcoords="offset points", fontsize=7
            )
    axes.set(
        xlabel="published: step with 64 nodes over one without", ylabel="estimated, and its range", xlim=ends, ylim=ends
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(
    plot: Annotated[Path | None, typer.Option(help="Draw here: .svg or .png.")] = None,
    measured: Annotated[Path | None, typer.Option(help="gpu.json of benchmarks/gpu.py.")] = None,
) -> None:
    """Print the tables."""
    held = [hold(point) for point in POINTS]
    print(markdown(held), speedups(held), sep="\n\n")
    if measured:
        print(f"\n{measured_table(json.loads(measured.read_text(encoding='utf-8')))}")
    if plot:
        draw(plot, held)


if __name__ == "__main__":
    typer.run(main)
