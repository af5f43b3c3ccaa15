"""The fused loss against torch's own, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from medusa_export.heads.training.cached import loss as head_loss
from medusa_export.heads.training.cached.loss import fused_cross_entropy

ROWS, HIDDEN, VOCAB = 23, 8, 40


@pytest.mark.parametrize("rows", [1, 5, ROWS])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_equals_the_loss_of_torch(share: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are worked on at once."""
    monkeypatch.setattr(head_loss, "CPU_VALUES", rows * VOCAB)
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, HIDDEN, generator=chance, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, generator=chance, requires_grad=True)
    teacher = torch.randn(ROWS, VOCAB, generator=chance).softmax(-1)
    labels = torch.randint(VOCAB, (ROWS,), generator=chance)
    labels[3] = -1

    logits = x @ weight.T
    soft = functional.cross_entropy(logits, teacher, reduction="sum")
    hard = functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-1)
    expected = (1 - share) * hard + share * soft
    wanted = torch.autograd.grad(expected * 0.5, [x, weight])

    loss = fused_cross_entropy(x, weight, labels, teacher=teacher, share=share)
    found = torch.autograd.grad(loss * 0.5, [x, weight])
    torch.testing.assert_close(loss, expected)
    for gradient, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, right, atol=1e-5, rtol=1e-4)


def test_a_frozen_projection_gets_no_gradient() -> None:
    x, weight = torch.ones(3, HIDDEN, requires_grad=True), torch.ones(VOCAB, HIDDEN)
    fused_cross_entropy(x, weight, torch.zeros(3, dtype=torch.long)).backward()
    assert x.grad is not None
    assert weight.grad is None


def test_products_in_bfloat16_are_close() -> None:
    chance = torch.Generator().manual_seed(1)
    x, weight = torch.randn(ROWS, HIDDEN, generator=chance), torch.randn(VOCAB, HIDDEN, generator=chance)
    labels = torch.randint(VOCAB, (ROWS,), generator=chance)
    exact = float(fused_cross_entropy(x, weight, labels))
    assert float(fused_cross_entropy(x, weight.bfloat16(), labels)) == pytest.approx(exact, rel=0.02)
