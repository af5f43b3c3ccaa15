"""What heads learn from cached rows: the token that came, and the base model's own distribution over it; one loss for all heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from medusa_export.heads.training.cached.loss import fused_cross_entropy
from medusa_export.heads.training.head_module import MedusaHeads
from medusa_export.heads.training.hidden_states import NO_LABEL, Rows

HEAD_DECAY = 0.8  # loss weight of head h is HEAD_DECAY ** h (arXiv 2401.10774, 2.2.1)
CHUNK_ROWS = 256  # rows whose logits exist at once; fewer make slower products
BLOCK_ROWS = 16  # neighbours that stay together in a batch: they share the base model's distributions


@dataclass(frozen=True)
class Objective:
    """The vocabulary that a loss is taken over, and how much of it is the base model's distribution.

    Attributes:
        tokens: ascending token ids.  # int64 [V']
        index_of: place of every token among them, or -1.  # int64 [vocab_size]
        distill: share of the loss, 0 .. 1; the rest is the token that came.
        dtype: that products with the vocabulary are taken in.
    """

    tokens: torch.Tensor
    index_of: torch.Tensor
    distill: float
    dtype: torch.dtype

    @classmethod
    def over(
        cls, labels: torch.Tensor, vocab_size: int, *, vocab: int, distill: float, dtype: torch.dtype
    ) -> Objective:
        """The ``vocab`` most frequent labels, or all tokens with 0.

        Args:
            labels: true tokens of all rows.  # int64 [rows]
            vocab_size: tokens of the model.
            vocab: how many tokens the loss is over; 0 takes all.
            distill: share of the teacher's distribution in the target, 0 to 1.
            dtype: of the products.
        """
        counts = torch.bincount(labels[labels != NO_LABEL], minlength=vocab_size)
        whole = not 0 < vocab < vocab_size
        tokens = torch.arange(vocab_size) if whole else counts.topk(vocab).indices.sort().values
        index_of = torch.full((vocab_size,), -1)
        index_of[tokens] = torch.arange(len(tokens))
        return cls(tokens, index_of, distill, dtype)

    def weight(self, projection: torch.Tensor) -> torch.Tensor:
        """Rows of a vocabulary projection.  # [vocab_size, D] -> [V', D]"""
        chosen = projection if len(self.tokens) == len(projection) else projection[self.tokens.to(projection.device)]
        return chosen.to(self.dtype)


class BatchLoss:
    """Mean loss of a batch and its gradient; heads have weights.

    Args:
        heads: what is trained.
        rows: cached states, which batches index.
        objective: see :class:`Objective`.
    """

    def __init__(self, heads: MedusaHeads, rows: Rows, objective: Objective) -> None:
        self._heads, self._rows, self._objective = heads, rows, objective
        self._labels = rows.labels(heads.num_heads)
        self._lm_head = objective.weight(heads.lm_head)

    def backward(self, batch: torch.Tensor) -> float:
        """Add the gradients of a batch's loss to the parameters'.

        The loss is the sum over heads h of HEAD_DECAY ** h times the sum over labels, divided by the number of rows: what the
        reference training takes, see ``medusa_model.medusa_loss``.

        Args:
            batch: ascending numbers of rows.  # int64 [R]

        Returns:
            the loss, in nats a row.
        """
        weights = [self._projection(head) for head in range(self._heads.num_heads)]
        total = 0.0
        for chunk in batch.split(CHUNK_ROWS):
            loss = self._chunk_loss(chunk, weights) / len(batch)
            if loss.requires_grad:  # answers of one token have no label for any head
                loss.backward()
            total += float(loss.detach())
        for head, weight in enumerate(weights):
            if weight.grad is not None:
                self._add_projection_gradient(head, weight.grad)
        return total

    def _projection(self, head: int) -> torch.Tensor:
        """What a head's logits are products with; its own one as a leaf, so that only the rows at hand have a gradient."""
        if self._heads.own_lm_head is None:
            return self._lm_head
        return self._objective.weight(self._heads.own_lm_head[head].detach()).clone().requires_grad_()

    def _add_projection_gradient(self, head: int, gradient: torch.Tensor) -> None:
        parameter = self._heads.own_lm_head
        assert parameter is not None
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad[head].index_add_(0, self._objective.tokens.to(parameter.device), gradient.to(parameter.dtype))

    def _chunk_loss(self, chunk: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        heads, device = self._heads, self._lm_head.device
        hidden = self._rows.read(chunk).to(device)  # [R, D]
        teacher, places = self._teacher(chunk)
        total = hidden.new_zeros(())
        for head in range(heads.num_heads):
            label = self._labels[chunk, head]  # [R]
            kept = (label != NO_LABEL).nonzero()[:, 0]
            target = self._objective.index_of[label[kept]].to(device)
            if self._objective.distill == 0:  # a token outside the vocabulary teaches nothing then
                kept, target = kept[target.cpu() >= 0], target[target >= 0]
            if not len(kept):
                continue
            total = total + HEAD_DECAY**head * fused_cross_entropy(
                heads(hidden[kept.to(device)], head),
                weights[head],
                target,
                teacher=None if teacher is None else teacher[places[kept, head].to(device)],
                share=self._objective.distill,
            )
        return total

    def _teacher(self, chunk: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Base model probabilities for the chunk's labels, and for each label the index of its row among them.

        Row ``t + 1 + h`` is where the base model predicts the label of head ``h`` at row ``t``; neighbours share them.

        Returns:
            float32 [T, V'] or None, and int64 [R, num_heads].
        """
        ahead = (chunk[:, None] + 1 + torch.arange(self._heads.num_heads)).clamp_max(len(self._rows) - 1)
        if self._objective.distill == 0:
            return None, ahead
        needed, places = ahead.unique(return_inverse=True)
        hidden = self._rows.read(needed).to(self._lm_head)
        return torch.softmax(hidden @ self._lm_head.T, dim=-1, dtype=torch.float32), places


def batches(count: int, batch_rows: int, seed: int, epoch: int) -> list[torch.Tensor]:
    """All rows, in another order every epoch; neighbours stay together in blocks.  # int64 [batch_rows] each, the last one fewer

    Args:
        count: rows in all.
        batch_rows: rows of a batch.
        seed, epoch: decide the order.
    """
    chance = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    blocks = torch.arange(count).split(BLOCK_ROWS)
    order = torch.randperm(len(blocks), generator=chance).tolist()
    rows = torch.cat([blocks[block] for block in order])
    return [batch.sort().values for batch in rows.split(batch_rows)]
