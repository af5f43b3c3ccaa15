"""Tokens per step that an engine's acceptance.json predicts for a run's prompts, and whether the run got there.

What was counted is a sample of prompts, and so is the run: the difference between two means of prompts has the variance of both.
Where categories were counted, each of the run's is foretold from its own answers. Below the interval something is wrong with the
heads, which decoding hides: whatever they draft, the output is the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medusa_export.engines.decoding.protocols import FirstDrafts
from medusa_export.heads.trees.acceptance import Acceptance, Answer, steps_of
from medusa_export.heads.trees.tree import Tree

REACH = 3.0  # standard deviations: one healthy run of a thousand is called wrong
FEWEST_ANSWERS = 4  # of a category, to foretell it from
FEWEST_STEPS = 20  # of a run, to judge it by
# First drafts that should have been right, to judge heads by, and the share of them below which they are another model's: prompts of
# another kind than those that were counted halve it.
FEWEST_EXPECTED, FAR_TOO_FEW = 8.0, 0.1

Rows = npt.NDArray[np.float64]  # tokens and steps of each answer.  # [P, 2]


@dataclass(frozen=True)
class Expectation:
    """What is foretold for some prompts.

    Attributes:
        low, high: bounds of the tokens per step for a run of that many prompts.
    """

    tokens_per_step: float
    low: float
    high: float

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return {
            "tokens_per_step": round(self.tokens_per_step, 4),
            "interval": [round(self.low, 4), round(self.high, 4)],
        }


def foretell(counted: Acceptance, tree: Tree, categories: Sequence[str]) -> Expectation | None:
    """Tokens per step of a run; None where no answers were counted, or there is no tree.

    Args:
        categories: of the run's prompts, one each.
    """
    if not counted.answers or not tree.max_draft_len or not categories:
        return None
    by_category: dict[str, list[Answer]] = {}
    for answer in counted.answers:
        by_category.setdefault(answer.category, []).append(answer)
    groups = {category: by_category.get(category, []) for category in set(categories)}
    tokens = steps = variance = 0.0
    for category, answers in groups.items():
        rows = _rows(answers if len(answers) >= FEWEST_ANSWERS else counted.answers, tree)
        if not len(rows):
            return None
        runs = list(categories).count(category)
        mean = rows.mean(axis=0)
        tokens, steps = tokens + runs * mean[0], steps + runs * mean[1]
        rest = rows[:, 0] - mean[0] / mean[1] * rows[:, 1]  # of the ratio
        spread = float(rest.var(ddof=1)) if len(rows) > 1 else float(mean[0] ** 2)
        variance += spread * (runs + runs**2 / len(rows))
    center, reach = tokens / steps, REACH * math.sqrt(variance) / steps
    return Expectation(center, max(1.0, center - reach), center + reach)


def _rows(answers: Sequence[Answer], tree: Tree) -> Rows:
    rows = np.array([steps_of(tree, answer.ranks) for answer in answers], dtype=np.float64).reshape(-1, 2)
    return rows[rows[:, 1] > 0]


def expectation_findings(expectation: Expectation | None, accepted: Sequence[int], *, ignore: bool) -> list[str]:
    """What a run's tokens per step say of the heads.

    Args:
        accepted: tokens that each step yielded, of all prompts.
        ignore: the prompts are of another kind than those that were counted.
    """
    if len(accepted) < FEWEST_STEPS:
        return []
    if max(accepted) <= 1:
        return [f"no draft was accepted in {len(accepted)} steps: the heads are not this model's, or read another row"]
    tokens_per_step = sum(accepted) / len(accepted)
    if ignore or expectation is None or tokens_per_step >= expectation.low:
        return []
    return [
        f"{tokens_per_step:.2f} tokens per step; acceptance.json predicts {expectation.tokens_per_step:.2f} "
        f"({expectation.low:.2f} .. {expectation.high:.2f}) for these prompts: the heads are not those that were measured "
        "(--no-expectation for prompts of another kind)"
    ]


def first_draft_findings(seen: Sequence[FirstDrafts]) -> list[str]:
    """What the heads' first drafts say of them, where steps choose whether heads draft.

    Args:
        seen: of every text.
    """
    steps, right, expected = (
        (sum(each) for each in zip(*(astuple(text) for text in seen), strict=True)) if seen else (0, 0, 0)
    )
    if expected < FEWEST_EXPECTED or right >= FAR_TOO_FEW * expected:
        return []
    return [
        f"heads were right in {right} of {steps} steps, where {expected:.0f} were expected: "
        "they are not this model's, or read another row"
    ]
