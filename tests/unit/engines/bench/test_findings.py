"""What a run's steps say of the heads, from made-up runs."""

from __future__ import annotations

from medusa_export.engines.bench.findings import accepted_findings
from medusa_export.engines.bench.runner import PromptResult, RunResult
from medusa_export.engines.decoding.drafters import PayingDrafter
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE, FirstDrafts, Generation
from medusa_export.engines.verify.expectation import Expectation
from medusa_export.heads.trees.step_costs import PRIOR_COSTS
from medusa_export.heads.trees.tree import Tree

TREE = Tree.from_choices([[0], [0, 0]])
CHOOSING = PayingDrafter({(0,): 0.3}, PRIOR_COSTS, 64)
PREDICTED = Expectation(2.0, 1.8, 2.2)


def run(accepted: list[int], first_drafts: FirstDrafts | None = None) -> RunResult:
    generation = Generation([5] * (sum(accepted) + 1), accepted=accepted, first_drafts=first_drafts)
    return RunResult([PromptResult("a", "", [1], [generation], [generation])], 0.01)


def messages(way: Tree | PayingDrafter, result: RunResult) -> list[str]:
    return [message for _, message in accepted_findings(way, result, PREDICTED, ignore=False)]


def test_one_tree_is_judged_by_tokens_per_step() -> None:
    assert messages(TREE, run([2] * 30)) == []
    (few,) = messages(TREE, run([1, 2] * 15))
    assert few.startswith("1.50 tokens per step; acceptance.json predicts 2.00 (1.80 .. 2.20)")
    (none,) = messages(TREE, run([1] * 30))
    assert none.startswith("no draft was accepted in 30 steps")


def test_no_drafts_say_nothing_of_the_heads() -> None:
    assert messages(AUTOREGRESSIVE, run([1] * 60)) == []


def test_drafts_by_what_pays_are_judged_by_what_heads_drafted() -> None:
    """Tokens per step are lower than the tree's where fewer nodes pay, and higher where the text is drafted from."""
    assert messages(CHOOSING, run([1] * 60, FirstDrafts())) == [], "nothing paid"
    assert messages(CHOOSING, run([1] * 60, FirstDrafts(40, 4, 12.0))) == [], "prompts of another kind"
    assert messages(CHOOSING, run([3] * 20, FirstDrafts(20, 0, 6.0))) == [], "too few to say"
    (wrong,) = messages(CHOOSING, run([3] * 60, FirstDrafts(40, 1, 12.0)))
    assert wrong == (
        "heads were right in 1 of 40 steps, where 12 were expected: they are not this model's, or read another row"
    )
