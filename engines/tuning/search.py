"""The tree of an engine: what its heads get right, what its steps cost, and the tree that follows, confirmed by running it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from medusa_export.core.errors import ConfigError
from medusa_export.core.text.words import counted
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
        batch: sequences in the steps whose costs these are.
        past_length: tokens of each in the cache; 0 where that is not known.
    """

    sizes: tuple[Candidate, ...]
    chosen: Candidate
    interval: tuple[float, float] | None = None
    measured: tuple[Measured[Tree], ...] = ()
    estimated: str | None = None
    batch: int = 1
    past_length: int = 0

    @property
    def runner_up(self) -> Candidate:
        """The fastest tree, should none pay: of those that were run, by what they ran at, and else by prediction."""
        ran = {item.tree: item.speedup for item in self.measured if item.speedup is not None}
        tried = [candidate for candidate in self.sizes[1:] if candidate.tree in ran] or self.sizes[1:]
        return max(tried, key=lambda candidate: ran.get(candidate.tree, candidate.speedup), default=self.chosen)

    def measurement_of(self, tree: Tree) -> Measured[Tree] | None:
        """A tree's, where it was run."""
        return next((item for item in self.measured if item.tree == tree), None)

    @property
    def measurement(self) -> Measured[Tree] | None:
        """The chosen tree's."""
        return self.measurement_of(self.chosen.tree)


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

    Raises:
        ConfigError: sizes of none of which there is a tree, where there are others.
    """
    counts = acceptance.paths, acceptance.positions
    wanted = candidates(*counts, cost, max_draft_len=max_draft_len, sizes=sizes)
    if sizes is not None and len(wanted) == 1:
        largest = candidates(*counts, cost, max_draft_len=max_draft_len)[-1].tree.num_nodes
        _require_tree(sizes, largest)
    walked = tuple(_walked(candidate, acceptance) for candidate in wanted)
    none = Search(walked, walked[0], estimated=cost.estimated, batch=cost.batch, past_length=cost.past_length)
    return _chosen(none, best(walked), acceptance)


def _require_tree(sizes: Sequence[int], largest: int) -> None:
    """Raise ConfigError for sizes of which there is no tree, where there are trees of up to ``largest`` nodes."""
    if largest > 1:
        got = f"{', '.join(map(str, sizes))}: no tree of so many nodes was timed and counted"
        raise ConfigError("--nodes", got, f"2 .. {largest}", "choose one of them")


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

    Where no answer has a second token, nothing was measured, and the prediction stands.

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
    found = replace(found, measured=tuple(measured))
    speeds = {run.tree: run.speedup for run in measured if run.speedup is not None}
    if not speeds:
        return found
    winner = max((candidate for candidate in order if candidate.tree in speeds), key=lambda item: speeds[item.tree])
    return _chosen(found, winner if speeds[winner.tree] > 1 else found.sizes[0], acceptance)


def sentence(found: Search) -> str:
    """What was chosen and why."""
    chosen, where = found.chosen, f"batch {found.batch}"
    where += f" with {found.past_length} tokens in the cache" if found.past_length else ""
    if len(found.sizes) == 1:
        return (
            f"No tree pays here, at {where}: no draft was ever right, or no step with drafts was timed{_origin(found)}."
        )
    if not chosen.tree.max_draft_len:
        other = found.runner_up
        return (
            f"No tree pays here, at {where}: the best one, {_shape(other.tree)}, is predicted to yield {other.tokens_per_step:.2f} "
            f"tokens per step at {other.cost_ratio:.2f} times the cost of a step without one, {other.speedup:.2f}x"
            f"{_measured(found, other.tree)}{_origin(found)}."
        )
    return (
        f"At {where}, the tree of {_shape(chosen.tree)}, yields {chosen.tokens_per_step:.2f} tokens per step at "
        f"{chosen.cost_ratio:.2f} times the cost of a step without one: predicted {chosen.speedup:.2f}x"
        f"{_range(found.interval)}{_measured(found, chosen.tree)}{_origin(found)}."
    )


def _measured(found: Search, tree: Tree) -> str:
    run = found.measurement_of(tree)
    if run is None:
        return ""
    if run.speedup is None:
        return ", not measured: every answer has one token"
    return f", measured {run.speedup:.2f}x{_range(run.interval)}"


def _range(interval: tuple[float, float] | None) -> str:
    return f" ({interval[0]:.2f} .. {interval[1]:.2f})" if interval else ""


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
                "speedup": None if item.speedup is None else round(item.speedup, 4),
                "speedup_ci95": _rounded(item.interval),
                "tokens_per_step": None if item.tokens_per_step is None else round(item.tokens_per_step, 4),
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


def _chosen(found: Search, chosen: Candidate, acceptance: Acceptance) -> Search:
    return replace(found, chosen=chosen, interval=acceptance.speedup_interval(chosen))


def _shape(tree: Tree) -> str:
    return f"{counted(tree.max_draft_len, 'draft token')}, {tree.depth} deep"


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
