"""One loss for both ways of training: what ``medusa_loss`` says of a batch is what ``BatchLoss`` says of its rows.

``test_train.py`` compares version 2 heads on answers of one turn. Here are the cases in which two definitions part: several answers
in a conversation, answers shorter than the heads look ahead, lm_heads of the heads' own, and a batch that is a part of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from medusa_export.heads.checkpoint.medusa_checkpoint import load_reference
from medusa_export.heads.training.cached.objective import HEAD_DECAY, BatchLoss, Objective
from medusa_export.heads.training.dataset import Example
from medusa_export.heads.training.full.arguments import ReferenceArguments
from medusa_export.heads.training.full.model import Collator
from medusa_export.heads.training.full.modelopt_medusa import (
    convert,
    decoder_states,
    head_targets,
    load_heads,
    medusa_loss,
)
from medusa_export.heads.training.head_module import MedusaHeads
from medusa_export.heads.training.hidden_states import Rows, build_cache

HEADS = 3
TOLERANCE = 1e-4
TURNS = [[(4, 6), (3, 9)], [(2, 1)], [(5, 3), (1, 2), (2, 7)], [(3, 12)]]  # (prompt, answer) of every turn


def examples() -> list[Example]:
    chance = torch.Generator().manual_seed(3)
    found = []
    for turns in TURNS:
        mask = [part for prompt, answer in turns for part in [False] * prompt + [True] * answer]
        found.append(Example(torch.randint(97, (len(mask),), generator=chance).tolist(), mask))
    return found


def pair(directory: Path, *, own: bool) -> tuple[Any, MedusaHeads]:
    """The same random heads in ModelOpt's form and as the module that is trained from cached rows."""
    model = convert(load_reference(directory, torch.float32), heads=HEADS, layers=2, share_lm_head=not own)
    heads = MedusaHeads(HEADS, 2, model.lm_head.weight.detach(), own_lm_head=own)
    chance = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=chance))
    load_heads(model, heads.tensors())
    return model, heads


def exact_rows(directory: Path, model: Any, part: Sequence[Example]) -> Rows:
    """The cache's rows with their states in float32: it stores them in bfloat16."""
    rows = build_cache(directory, lambda: model, part, key="a", hidden_size=model.config.hidden_size)
    batch = Collator()(part)
    states = decoder_states(model, batch).detach()
    return replace(rows, hidden=(states[head_targets(batch["labels"], 0)[..., 0] != -100],))


def losses(
    model: Any, heads: MedusaHeads, part: Sequence[Example], rows: Rows, numbers: torch.Tensor
) -> tuple[float, float]:
    weights = ReferenceArguments(heads=HEADS).head_weights
    wanted = medusa_loss(model, Collator()(part), freeze_base=True, head_weights=weights)
    wanted.loss.backward()
    objective = Objective.over(rows.labels(HEADS), len(heads.lm_head), vocab=0, distill=0.0, dtype=torch.float32)
    return BatchLoss(heads, rows, objective).backward(numbers), float(wanted.loss.detach())


def test_weights_are_one_definition() -> None:
    assert ReferenceArguments(heads=HEADS).head_weights == tuple(HEAD_DECAY**head for head in range(HEADS))


@pytest.mark.parametrize("own", [False, True])
def test_same_loss_and_gradients(own: bool, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model, heads = pair(tiny_checkpoint(tmp_path / "base", "llama"), own=own)
    rows = exact_rows(tmp_path / "cache", model, examples())
    assert len(rows) == sum(answer for turns in TURNS for _, answer in turns)
    found, wanted = losses(model, heads, examples(), rows, torch.arange(len(rows)))
    assert found == pytest.approx(wanted, rel=TOLERANCE)
    for index, head in enumerate(model.medusa_heads):
        pairs = [(heads.weight.grad[index, layer], head[layer].linear.weight.grad) for layer in range(2)]
        pairs += [(heads.bias.grad[index, layer], head[layer].linear.bias.grad) for layer in range(2)]
        pairs += [(heads.own_lm_head.grad[index], head[-1].weight.grad)] if own else []
        for mine, right in pairs:
            assert float((mine - right).norm() / right.norm()) < 10 * TOLERANCE


def test_same_loss_on_every_batch(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Divided by the rows of the batch, not of all: batches of one conversation have different numbers of labels a head."""
    model, heads = pair(tiny_checkpoint(tmp_path / "base", "llama"), own=False)
    rows = exact_rows(tmp_path / "cache", model, examples())
    first, seen = 0, set()
    for example in examples():
        count = sum(example.answer_mask)
        found, wanted = losses(model, heads, [example], rows, torch.arange(first, first + count))
        assert found == pytest.approx(wanted, rel=TOLERANCE, abs=TOLERANCE)
        seen.add(round(wanted, 3))
        first += count
    assert len(seen) == len(TURNS)  # the comparison can fail
    assert 0.0 in seen  # an answer of one token: nothing for a head to learn, and no gradient to ask for
