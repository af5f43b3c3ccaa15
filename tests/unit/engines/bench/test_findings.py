"""What a run's steps say of the heads, from made-up runs."""

from __future__ import annotations

from medusa_export.engines.bench.findings import accepted_findings
from medusa_export.engines.bench.runner import PromptResult, RunResult
from medusa_export.engines.decoding.protocols import Generation
from medusa_export.heads.trees.tree import Tree

TREE = Tree.from_choices([[0], [0, 0]])


def steps(accepted: list[int], drafted: list[int]) -> RunResult:
    generation = Generation([5] * (sum(accepted) + 1), accepted=accepted, drafted=drafted)
    return RunResult([PromptResult("a", "", [1], [generation], [generation])], 0.01)


def test_steps_without_drafts_say_nothing_of_the_heads() -> None:
    nothing_paid = steps([1] * 60, [0] * 60)
    assert accepted_findings(TREE, nothing_paid, None, ignore=False) == []
    ((name, message),) = accepted_findings(TREE, steps([1] * 60, [0] * 40 + [2] * 20), None, ignore=False)
    assert name == "tokens-per-step"
    assert message.startswith("no draft was accepted in 20 steps that had some")
    assert accepted_findings(TREE, steps([1] * 59 + [2], [0] * 40 + [2] * 20), None, ignore=False) == []
