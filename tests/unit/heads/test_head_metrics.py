"""Ranks, accuracies, trees and tokens per step on numbers that can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medusa_export.heads.head_metrics import ABSENT, accuracies, best_tree, head_ranks, path_counts, tokens_per_step
from medusa_export.heads.head_module import MedusaHeads
from medusa_export.heads.hidden_cache import Rows
from medusa_export.heads.tree import Tree

RANKS = np.array([[0, 0], [1, 3], [0, ABSENT], [ABSENT, 0], [0, -1], [-1, -1]])
ANSWERS = np.zeros(6, dtype=np.int64)


def test_ranks_count_the_better_tokens() -> None:
    lm_head = torch.eye(4)
    heads = MedusaHeads(2, 1, lm_head)  # the identity: the logits are the hidden state
    hidden = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.9, 0.0, 0.1, 0.5], [0.0, 0.1, 0.2, 0.3]], dtype=torch.bfloat16)
    rows = Rows((hidden,), torch.tensor([0, 3]), torch.tensor([0, 2, 1]), torch.zeros(3, dtype=torch.long))
    assert head_ranks(heads, rows).tolist() == [[1, 0], [3, -1], [-1, -1]]


def test_accuracies_leave_out_what_has_no_label() -> None:
    first, second = accuracies(RANKS)
    assert (first["top1"], first["top2"]) == (3 / 5, 4 / 5)
    assert (second["top1"], second["top4"]) == (2 / 4, 3 / 4)


def test_tokens_per_step_walks_as_an_engine_does() -> None:
    """Row 0 accepts two drafts (3 tokens, on to row 3), row 3 none (to row 4), row 4 one, of which the answer has room for 1."""
    assert tokens_per_step(Tree.from_choices([[0], [0, 0]]), RANKS, ANSWERS) == pytest.approx(5 / 3)
    assert tokens_per_step(Tree(()), RANKS, ANSWERS) == 1.0
    assert tokens_per_step(Tree.from_choices([[1]]), RANKS, ANSWERS) == pytest.approx(5 / 4)


def test_the_tree_grows_where_true_paths_go_on() -> None:
    assert path_counts(RANKS) == {(0,): 3, (0, 0): 1, (1,): 1, (1, 3): 1}
    assert set(best_tree(RANKS, 2).choices) == {(0,), (1,)}
    assert set(best_tree(RANKS, 9).choices) == set(path_counts(RANKS))
