"""The loss of one head over a large vocabulary, a few rows at a time: logits of all rows, heads and tokens never exist at once.

Its gradient is known as soon as its logits are, so the backward pass has nothing to compute again: softmax(logits) - target.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

CHUNK_ROWS = 256


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over rows of the cross-entropy between ``x @ weight.T`` and a target, see :func:`chunked_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        teacher: torch.Tensor | None,
        teacher_weight: torch.Tensor,
        share: float,
    ) -> torch.Tensor:
        loss = x.new_zeros(())
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(x), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            log_probabilities = functional.log_softmax(x[rows] @ weight.T, dim=-1)  # [R, V]
            nll = -log_probabilities.gather(1, labels[rows, None])
            grad = log_probabilities.exp()
            hard = 1.0
            if teacher is not None:
                target = functional.softmax(teacher[rows] @ teacher_weight.T, dim=-1)
                loss -= share * (target * log_probabilities).sum()
                grad.sub_(target, alpha=share)
                hard -= share
            loss += hard * nll.sum()
            grad.scatter_add_(1, labels[rows, None], grad.new_full((len(grad), 1), -hard))
            grad_x[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ x[rows]
        ctx.save_for_backward(grad_x, *([] if grad_weight is None else [grad_weight]))
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale, saved = grad_outputs[0], ctx.saved_tensors
        grad_weight = saved[1] * scale if len(saved) > 1 else None
        return saved[0] * scale, grad_weight, None, None, None, None


def chunked_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    teacher: torch.Tensor | None = None,
    teacher_weight: torch.Tensor | None = None,
    share: float = 0.0,
) -> torch.Tensor:
    """Sum of (1 - share) * cross-entropy with the label + share * cross-entropy with the base model's own distribution.

    Args:
        x: what a head's blocks gave.  # [R, hidden_size]
        weight: its vocabulary projection, or some rows of it.  # [V, hidden_size]
        labels: row of ``weight`` that is right.  # int64 [R]
        teacher: the base model's hidden state one position before the label.  # [R, hidden_size]
        teacher_weight: the base model's projection, the same rows; None: ``weight``.
        share: 0 .. 1.

    Returns:
        a scalar; gradients flow to ``x`` and, if it is trained, to ``weight``.
    """
    use = teacher if share else None
    source = weight if teacher_weight is None else teacher_weight
    loss: torch.Tensor = ChunkedCrossEntropy.apply(x, weight, labels, use, source.detach(), share)
    return loss
