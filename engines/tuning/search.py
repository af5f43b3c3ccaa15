"""The tree of an engine: what its heads get right, what its steps cost, and the tree that follows, confirmed by running it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from medusa_export.engines.decoding.protocols import StepEngine
from medusa_export.engines.measure.side_by_side import Measured, compare
from medusa_export.heads.trees.acceptance import Acceptance
from medusa_export.heads.trees.search import Candidate, CostCurve, best, candidates
from medusa_export.heads.trees.tree import Tree

MAX_DRAFT_LEN = 63
CONFIRMED = 3


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        sizes: the fastest tree of every size by prediction, smallest first; the first is none.
        chosen: by measurement where there is one, else by prediction; an empty tree where none pays.
        interval: of its predicted speed-up, over prompts, and over what estimated costs may be; None where neither is known.
        measured: the trees that were run.
        estimated: the GPU that the costs were estimated for; None where they were measured.
    """

    sizes: tuple[Candidate, ...]
    chosen: Candidate
    interval: tuple[float, float] | None = None
    measured: tuple[Measured[Tree], ...] = ()
    estimated: str | None = None

    @property
    def runner_up(self) -> Candidate:
        """The fastest tree, should none pay."""
        return max(self.sizes[1:], key=lambda candidate: candidate.speedup, default=self.chosen)

    @property
    def measurement(self) -> Measured[Tree] | None:
        """The chosen tree's."""
        return next((item for item in self.measured if item.tree == self.chosen.tree), None)


def search(
    acceptance: Acceptance, cost: CostCurve, *, max_draft_len: int = MAX_DRAFT_LEN, sizes: Sequence[int] | None = None
) -> Search:
    """The tree with most predicted tokens a second.

    Every size's tree comes from the counted paths. Where answers are known, its tokens per step are those of decoding them with it.

    Args:
        acceptance: counted paths.
        cost: milliseconds of a step by nodes.
        max_draft_len: most draft nodes of a tree.
        sizes: numbers of nodes to look at, the root included; None: all.
    """
    found = [
        _walked(candidate, acceptance)
        for candidate in candidates(
            acceptance.paths, acceptance.positions, cost, max_draft_len=max_draft_len, sizes=sizes
        )
    ]
    return _chosen(tuple(found), best(found), acceptance, cost.estimated)


def confirm(
    found: Search,
    acceptance: Acceptance,
    engine: StepEngine,
    prompts: Sequence[list[int]],
    *,
    count: int = CONFIRMED,
    max_new_tokens: int,
    repeats: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Search:
    """Run the trees with the best predictions, and take the fastest of them if it is faster than no tree.

    Args:
        found: the search.
        acceptance: that it was made from.
        engine: what runs the trees.
        prompts: token ids.
        count: trees to run.
        max_new_tokens: most tokens of an answer.
        repeats: runs of each prompt.
        progress: called with (done, total) answers.
    """
    order = sorted(found.sizes[1:], key=lambda candidate: -candidate.speedup)[:count]
    if not order:
        return found
    measured = compare(
        engine, [candidate.tree for candidate in order], prompts,
        max_new_tokens=max_new_tokens, repeats=repeats, progress=progress,
    )  # fmt: skip
    winner, speed = max(zip(order, measured, strict=True), key=lambda pair: pair[1].speedup)
    chosen = winner if speed.speedup > 1 else found.sizes[0]
    return replace(_chosen(found.sizes, chosen, acceptance, found.estimated), measured=tuple(measured))


def sentence(found: Search) -> str:
    """What was chosen and why."""
    chosen = found.chosen
    if not chosen.tree.max_draft_len:
        other = found.runner_up
        run = max((item.speedup for item in found.measured), default=None)
        tested = f", measured {run:.2f}x" if run is not None else ""
        return (
            f"No tree pays here: the best one, {_shape(other.tree)}, is predicted to yield {other.tokens_per_step:.2f} tokens a step "
            f"at {other.cost_ratio:.2f} times the cost of a step without one, {other.speedup:.2f}x{tested}{_origin(found)}."
        )
    interval = f" ({found.interval[0]:.2f} .. {found.interval[1]:.2f})" if found.interval else ""
    text = (
        f"The tree of {_shape(chosen.tree)} yields {chosen.tokens_per_step:.2f} tokens a step at {chosen.cost_ratio:.2f} times "
        f"the cost of a step without one: predicted {chosen.speedup:.2f}x{interval}"
    )
    if found.measurement:
        low, high = found.measurement.interval
        text += f", measured {found.measurement.speedup:.2f}x ({low:.2f} .. {high:.2f})"
    return f"{text}{_origin(found)}."


def _origin(found: Search) -> str:
    return f"; costs are estimated for {found.estimated}, not measured" if found.estimated else ""


def tree_json(found: Search, crossover: Sequence[dict[str, Any]] = ()) -> str:
    """The text of ``tree.json``: the choices in every form, and what they rest on."""
    chosen = found.chosen
    body: dict[str, Any] = json.loads(chosen.tree.to_json())
    body |= {
        "triton_medusa_choices": chosen.tree.to_triton(),
        "why": sentence(found),
        "costs": {"estimated": found.estimated} if found.estimated else "measured",
        "predicted": {**_figures(chosen), "speedup_ci95": _rounded(found.interval)},
        "measured": [
            {
                "medusa_choices": [list(choice) for choice in item.tree.choices],
                "speedup": round(item.speedup, 4),
                "speedup_ci95": _rounded(item.interval),
                "tokens_per_step": round(item.tokens_per_step, 4),
            }
            for item in found.measured
        ],
        "sizes": [_figures(candidate) for candidate in found.sizes],
        "crossover": list(crossover),
    }
    return json.dumps(body, indent=1) + "\n"


def _walked(candidate: Candidate, acceptance: Acceptance) -> Candidate:
    walk = acceptance.walk(candidate.tree)
    return replace(candidate, tokens_per_step=walk[0]) if walk else candidate


def _chosen(sizes: tuple[Candidate, ...], chosen: Candidate, acceptance: Acceptance, estimated: str | None) -> Search:
    return Search(sizes, chosen, acceptance.speedup_interval(chosen), estimated=estimated)


def _shape(tree: Tree) -> str:
    tokens = "1 draft token" if tree.max_draft_len == 1 else f"{tree.max_draft_len} draft tokens"
    return f"{tokens}, {tree.depth} deep"


def _figures(candidate: Candidate) -> dict[str, Any]:
    return {
        "max_draft_len": candidate.tree.max_draft_len,
        "depth": candidate.tree.depth,
        "tokens_per_step": round(candidate.tokens_per_step, 4),
        "cost_ratio": round(candidate.cost_ratio, 4),
        "speedup": round(candidate.speedup, 4),
        **({"cost_range": _rounded(candidate.cost_range)} if candidate.cost_range else {}),
    }


def _rounded(interval: tuple[float, float] | None) -> list[float] | None:
    return [round(value, 4) for value in interval] if interval else None
