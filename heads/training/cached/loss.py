"""The loss of one head on some rows, with its gradient: softmax(logits) - target is known as soon as the logits are.

Nothing is kept for a backward pass through the vocabulary, so no more logits exist at once than those of one head and the rows at
hand: rows are passed a few hundred at a time.
"""

from __future__ import annotations

from typing import Any

import torch

# Logits worked on at once: what stays in a core's cache. Fresh memory costs more than the arithmetic.
CPU_VALUES = 1 << 20


class FusedCrossEntropy(torch.autograd.Function):
    """Sum over rows of the cross-entropy between ``x @ weight.T`` and a target, see :func:`fused_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        teacher: torch.Tensor | None,
        share: float,
    ) -> torch.Tensor:
        """The sum of the rows' losses; gradients are computed along with it.

        Args:
            ctx: autograd's, for :meth:`backward`.
            x: hidden states.  # [R, D]
            weight: of the vocabulary projection.  # [V, D]
            labels: token ids; below 0: none.  # [R]
            teacher: probabilities to learn from besides; None: labels alone.  # [R, V]
            share: weight of the teacher's part, 0 .. 1.
        """
        inputs = x.to(weight.dtype)
        logits = inputs @ weight.T  # [R, V], and later their gradient
        rows = max(1, CPU_VALUES // len(weight)) if logits.device.type == "cpu" else max(1, len(logits))
        parts = (logits, labels) if teacher is None else (logits, labels, teacher)
        losses = [_to_gradient(*part, share=share) for part in zip(*(each.split(rows) for each in parts), strict=True)]
        saved = [(logits @ weight).to(x.dtype)]
        if ctx.needs_input_grad[1]:
            saved.append(logits.T @ inputs)
        ctx.save_for_backward(*saved)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale, saved = grad_outputs[0], ctx.saved_tensors
        return saved[0] * scale, saved[1] * scale if len(saved) > 1 else None, None, None, None


def _to_gradient(
    logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor | None = None, *, share: float
) -> torch.Tensor:
    """The loss of some rows, whose logits become its gradient in place."""
    values = logits.to(torch.float32)
    known = labels >= 0
    target = labels.clamp_min(0)[:, None]
    hard = torch.where(known, 1.0 - share, 0.0)[:, None]  # [R, 1]
    values -= values.amax(dim=1, keepdim=True)
    right = values.gather(1, target)
    soft = 0.0 if teacher is None else share * torch.vdot(teacher.flatten(), values.flatten())
    total = values.exp_().sum(dim=1, keepdim=True)  # [R, 1]
    weight = hard if teacher is None else hard + share
    loss = (weight * total.log()).sum() - (hard * right).sum() - soft
    values *= weight / total
    if teacher is not None:
        values.sub_(teacher, alpha=share)
    values.scatter_add_(1, target, -hard)
    logits.copy_(values)
    return loss


def fused_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    teacher: torch.Tensor | None = None,
    share: float = 0.0,
) -> torch.Tensor:
    """Sum of (1 - share) * cross-entropy with the label + share * cross-entropy with the base model's own distribution.

    Args:
        x: what a head's blocks gave.  # [R, hidden_size]
        weight: its vocabulary projection, or some rows of it; its dtype is that of the products.  # [V, hidden_size]
        labels: row of ``weight`` that is right, or -1 for none.  # int64 [R]
        teacher: the base model's probabilities of the label's token.  # float32 [R, V]
        share: 0 .. 1; above 0 only with a teacher.

    Returns:
        a scalar; gradients flow to ``x`` and, if it is trained, to ``weight``.
    """
    loss: torch.Tensor = FusedCrossEntropy.apply(x, weight, labels, teacher if share else None, share)
    return loss
