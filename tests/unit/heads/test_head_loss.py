"""The chunked loss against torch's own on whole logits, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from medusa_export.heads import head_loss
from medusa_export.heads.head_loss import chunked_cross_entropy

ROWS, HIDDEN, VOCAB = 23, 8, 40


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [4, 256])
def test_equals_the_loss_of_whole_logits(share: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "CHUNK_ROWS", chunk)
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, HIDDEN, generator=chance, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, generator=chance, requires_grad=True)
    teacher, base = torch.randn(ROWS, HIDDEN, generator=chance), torch.randn(VOCAB, HIDDEN, generator=chance)
    labels = torch.randint(VOCAB, (ROWS,), generator=chance)

    logits = x @ weight.T
    soft = functional.cross_entropy(logits, (teacher @ base.T).softmax(-1), reduction="sum")
    expected = (1 - share) * functional.cross_entropy(logits, labels, reduction="sum") + share * soft
    wanted = torch.autograd.grad(expected * 0.5, [x, weight])

    loss = chunked_cross_entropy(x, weight, labels, teacher=teacher, teacher_weight=base, share=share)
    found = torch.autograd.grad(loss * 0.5, [x, weight])
    torch.testing.assert_close(loss, expected)
    for gradient, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, right, atol=1e-5, rtol=1e-4)


def test_a_frozen_projection_gets_no_gradient() -> None:
    x, weight = torch.ones(3, HIDDEN, requires_grad=True), torch.ones(VOCAB, HIDDEN)
    chunked_cross_entropy(x, weight, torch.zeros(3, dtype=torch.long)).backward()
    assert x.grad is not None
    assert weight.grad is None
