"""A tree as a picture, with how often each of its paths is the true one, and the speed that trees of every size would have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medusa_export.core.errors import missing_package
from medusa_export.engines.tuning.search import Search
from medusa_export.heads.trees.acceptance import Acceptance
from medusa_export.heads.trees.tree import Choice, Tree

LABELLED = 24  # nodes up to which every edge has its number


def draw(path: Path, found: Search, acceptance: Acceptance) -> None:
    """Write an SVG or PNG, by the file's suffix.

    Args:
        path: of the picture; .svg or .png.
        found: the search.
        acceptance: that it was made from.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_package("matplotlib", "train") from error
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_tree(left, found.chosen.tree, acceptance)
    _draw_speed(right, found)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def positions(tree: Tree) -> dict[Choice, tuple[float, float]]:
    """Where the nodes lie: leaves side by side, parents above the middle of their children.  # choice -> (x, -depth)"""
    children: dict[Choice, list[Choice]] = {(): []}
    for choice in tree.choices:
        children.setdefault(choice, [])
        children[choice[:-1]].append(choice)
    places: dict[Choice, tuple[float, float]] = {}
    free = 0.0
    for choice in sorted(children, key=_after_its_children):
        below = [places[child][0] for child in children[choice]]
        if not below:
            below = [free]
            free += 1
        places[choice] = ((below[0] + below[-1]) / 2, -float(len(choice)))
    return places


def _after_its_children(choice: Choice) -> tuple[int, ...]:
    return (*choice, 1 << 10)


def _draw_tree(axes: Any, tree: Tree, acceptance: Acceptance) -> None:
    places = positions(tree)
    for choice in tree.choices:
        (x, y), (parent_x, parent_y) = places[choice], places[choice[:-1]]
        share = acceptance.paths.get(choice, 0) / acceptance.positions
        axes.plot([parent_x, x], [parent_y, y], color="tab:blue", linewidth=0.5 + 8 * share, zorder=1)
        if tree.num_nodes <= LABELLED:
            axes.annotate(f"{share:.0%}", ((x + parent_x) / 2, (y + parent_y) / 2), ha="center", fontsize=8)
    for choice, (x, y) in places.items():
        axes.scatter([x], [y], s=200, color="white", edgecolor="tab:blue", zorder=2)
        axes.annotate(str(choice[-1]) if choice else "", (x, y), ha="center", va="center", fontsize=8, zorder=3)
    axes.set(title="Ranks, and how often a path is the true one", yticks=[-d for d in range(tree.depth + 1)], xticks=[])
    axes.set_yticklabels(["root", *(f"head {depth}" for depth in range(tree.depth))])
    for side in axes.spines.values():
        side.set_visible(False)


def _draw_measured(axes: Any, found: Search) -> None:
    """The trees that were run, with the intervals that are known."""
    ran = [(item.tree.num_nodes, item.speedup, item.interval) for item in found.measured if item.speedup is not None]
    if not ran:
        return
    sizes, speeds, intervals = zip(*ran, strict=True)
    ends = [interval or (speed, speed) for speed, interval in zip(speeds, intervals, strict=True)]
    below = [speed - low for speed, (low, _) in zip(speeds, ends, strict=True)]
    above = [high - speed for speed, (_, high) in zip(speeds, ends, strict=True)]
    axes.errorbar(sizes, speeds, yerr=(below, above), fmt="o", color="black", capsize=3, label="measured")


def _draw_speed(axes: Any, found: Search) -> None:
    curves: Mapping[str, list[float]] = {
        "tokens per step": [item.tokens_per_step for item in found.sizes],
        "cost of a step": [item.cost_ratio for item in found.sizes],
        "predicted speed-up": [item.speedup for item in found.sizes],
    }
    nodes = [item.tree.num_nodes for item in found.sizes]
    for name, values in curves.items():
        axes.plot(nodes, values, label=name, linewidth=2 if "speed" in name else 1)
    ranged = [item for item in found.sizes if item.cost_range]
    if ranged:
        low_ends, high_ends = zip(
            *((item.tokens_per_step / cost for cost in item.cost_range or ()) for item in ranged), strict=True
        )
        axes.fill_between(
            [item.tree.num_nodes for item in ranged], high_ends, low_ends, alpha=0.15, label="what the estimate may be"
        )
    _draw_measured(axes, found)
    axes.axvline(found.chosen.tree.num_nodes, color="gray", linestyle=":")
    axes.axhline(1, color="gray", linewidth=0.5)
    origin = f", costs estimated for {found.estimated}" if found.estimated else ""
    axes.set(title=f"Speed by size{origin}", xlabel="nodes, the root included", ylabel="times no tree", xscale="log")
    axes.set_ylim(0, 1.15 * max(*curves["tokens per step"], 1.3))
    axes.legend()
    axes.grid(alpha=0.3)
