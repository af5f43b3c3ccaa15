"""Ranks of true tokens on heads whose logits are known."""

from __future__ import annotations

import torch

from medusa_export.heads.training.head_module import MedusaHeads
from medusa_export.heads.training.hidden_states import Rows
from medusa_export.heads.training.metrics import head_candidates, head_ranks


def test_ranks_count_the_better_tokens() -> None:
    lm_head = torch.eye(4)
    heads = MedusaHeads(2, 1, lm_head)  # the identity: the logits are the hidden state
    hidden = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.9, 0.0, 0.1, 0.5], [0.0, 0.1, 0.2, 0.3]], dtype=torch.bfloat16)
    rows = Rows((hidden,), torch.tensor([0, 3]), torch.tensor([0, 2, 1]), torch.zeros(3, dtype=torch.long))
    assert head_ranks(heads, rows).tolist() == [[1, 0], [3, -1], [-1, -1]]


def test_candidates_are_the_best_tokens_in_their_order() -> None:
    heads = MedusaHeads(2, 1, torch.eye(4))
    hidden = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.9, 0.0, 0.1, 0.5]], dtype=torch.bfloat16)
    rows = Rows((hidden,), torch.tensor([0, 2]), torch.tensor([0, 2]), torch.zeros(2, dtype=torch.long))
    assert head_candidates(heads, rows, limit=5).tolist() == [[[1, 2, 3, 0]] * 2, [[0, 3, 2, 1]] * 2]
    assert head_candidates(heads, rows, limit=1).shape == (1, 2, 4)
