"""Training from cached rows: the loss is the reference's, it learns, it stops, and it goes on where it was killed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from medusa_export.core.errors import ConfigError
from medusa_export.heads.checkpoint.medusa_checkpoint import load_reference
from medusa_export.heads.training.cached.objective import BatchLoss, Objective, batches
from medusa_export.heads.training.cached.trainer import TrainArguments, train_heads
from medusa_export.heads.training.dataset import Example
from medusa_export.heads.training.full.model import Collator
from medusa_export.heads.training.full.modelopt_medusa import convert, decoder_states, load_heads, medusa_loss
from medusa_export.heads.training.head_module import MedusaHeads
from medusa_export.heads.training.hidden_states import Rows, build_cache
from medusa_export.heads.training.metrics import head_ranks
from medusa_export.heads.trees.acceptance import accuracies

VOCAB, HIDDEN = 30, 16
ARGUMENTS = TrainArguments(epochs=6, lr=0.02, batch_rows=64, checkpoint_every=3, log_every=1)


def predictable_rows(answers: int = 40, length: int = 12) -> Rows:
    """Every token is the one before it plus one, and a row's hidden state tells its token."""
    chance = torch.Generator().manual_seed(0)
    embedding = torch.randn(VOCAB, HIDDEN, generator=chance)
    first = torch.randint(VOCAB, (answers, 1), generator=chance)
    tokens = ((first + torch.arange(length)) % VOCAB).flatten()
    hidden = embedding[tokens].bfloat16()
    return Rows((hidden,), torch.tensor([0, len(tokens)]), tokens, torch.arange(answers).repeat_interleave(length))


def new_heads(own_lm_head: bool = False) -> MedusaHeads:
    lm_head = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1))
    return MedusaHeads(2, 1, lm_head, own_lm_head=own_lm_head)


@pytest.mark.parametrize("own_lm_head", [False, True])
@pytest.mark.parametrize("options", [{}, {"distill": 0.5}, {"vocab": 29}, {"bf16": True}])
def test_learns_what_can_be_learnt(own_lm_head: bool, options: dict[str, Any]) -> None:
    rows, heads = predictable_rows(), new_heads(own_lm_head)
    before = accuracies(head_ranks(heads, rows))[0]["top1"]
    share = options.get("distill", 0.0)
    state = train_heads(heads, rows, rows, replace(ARGUMENTS, **{"epochs": 10, **options}))
    after = accuracies(head_ranks(heads, rows))[0]["top1"]
    assert before < 0.3
    assert after > (before + 0.25 if not share else before + 0.1)  # the base of this test knows nothing
    assert state.losses[-1][1] < state.losses[0][1]


def test_the_loss_is_the_references(tiny_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    """Same conversations, same heads, float32: the same loss and the same gradients; from the stored states nearly."""
    tiny_checkpoint(tmp_path / "base", "llama")
    model = convert(load_reference(tmp_path / "base", torch.float32), heads=3, layers=1, share_lm_head=True)
    chance = torch.Generator().manual_seed(2)
    heads = MedusaHeads(3, 1, model.lm_head.weight.detach())
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=chance))
    load_heads(model, heads.tensors())
    examples = [
        Example(torch.randint(97, (size,), generator=chance).tolist(), [False] * 4 + [True] * (size - 4))
        for size in (9, 17, 6)
    ]
    batch = Collator()(examples)
    wanted = medusa_loss(model, batch, freeze_base=True, head_weights=[1, 0.8, 0.64])
    wanted.loss.backward()

    stored = build_cache(tmp_path / "cache", lambda: model, examples, key="a", hidden_size=model.config.hidden_size)
    states = decoder_states(model, batch).detach()
    exact = torch.cat([states[row, 3 : len(each.input_ids) - 1] for row, each in enumerate(examples)])
    for rows, tolerance in ((replace(stored, hidden=(exact,)), 1e-4), (stored, 1e-2)):
        objective = Objective.over(rows.labels(3), len(heads.lm_head), vocab=0, distill=0.0, dtype=torch.float32)
        heads.zero_grad()
        loss = BatchLoss(heads, rows, objective).backward(torch.arange(len(rows)))
        assert loss == pytest.approx(float(wanted.loss.detach()), rel=tolerance)
        for head in range(3):
            right = model.medusa_heads[head][0].linear.weight.grad
            found = heads.weight.grad[head, 0]
            assert float((found - right).norm() / right.norm()) < 10 * tolerance


def test_chunks_and_blocks_do_not_change_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for chunk in (7, 256):
        monkeypatch.setattr("medusa_export.heads.training.cached.objective.CHUNK_ROWS", chunk)
        rows, heads = predictable_rows(), new_heads()
        objective = Objective.over(rows.labels(2), VOCAB, vocab=0, distill=0.3, dtype=torch.float32)
        found.append(BatchLoss(heads, rows, objective).backward(torch.arange(100)))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_an_epoch_is_every_row_once_in_another_order() -> None:
    first, second = (batches(100, 32, seed=1, epoch=epoch) for epoch in (0, 1))
    assert torch.equal(torch.cat(first).sort().values, torch.arange(100))
    assert [len(batch) for batch in first] == [32, 32, 32, 4]
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert torch.equal(torch.cat(first), torch.cat(batches(100, 32, seed=1, epoch=0)))


class KilledError(Exception):
    """Stands in for a signal."""


@pytest.mark.parametrize("at", [2, 8, 9, 20])
def test_interrupted_and_continued_gives_the_same_heads(at: int, tmp_path: Path) -> None:
    def kill(done: int, total: int) -> None:
        if done == at:
            raise KilledError

    rows, whole, broken = predictable_rows(), new_heads(), new_heads()
    expected = train_heads(whole, rows, rows, ARGUMENTS)
    with pytest.raises(KilledError):
        train_heads(broken, rows, rows, ARGUMENTS, checkpoint=tmp_path / "state", progress=kill)
    again = new_heads()
    found = train_heads(again, rows, rows, ARGUMENTS, checkpoint=tmp_path / "state")
    assert torch.equal(again.weight, whole.weight)
    assert torch.equal(again.bias, whole.bias)
    assert (found.losses, found.epochs) == (expected.losses, expected.epochs)


def test_patience_ends_and_the_best_heads_stay() -> None:
    rows = predictable_rows()
    state = train_heads(new_heads(), rows, rows, replace(ARGUMENTS, epochs=50, lr=1e-9, patience=2))
    assert len(state.epochs) == 3


def test_a_loss_that_is_not_finite() -> None:
    rows = predictable_rows()
    rows.hidden[0][5] = float("nan")
    with pytest.raises(ConfigError, match="a loss of nan at step"):
        train_heads(new_heads(), rows, rows, ARGUMENTS)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"epochs": 0}, "epochs"), ({"lr": float("nan")}, "lr"), ({"distill": 2}, "distill"), ({"vocab": -1}, "vocab"),
     ({"max_steps": 0}, "max_steps"), ({"batch_rows": 0}, "batch_rows"), ({"warmup": 1}, "warmup")],
)  # fmt: skip
def test_arguments_that_train_nothing(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        replace(ARGUMENTS, **options).check()
