"""Training of heads on a frozen base, from cached hidden states: no pass through the base model, whatever the number of epochs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from medusa_export.heads.errors import ConfigError
from medusa_export.heads.head_loss import chunked_cross_entropy
from medusa_export.heads.head_metrics import accuracies, head_ranks, mean_accuracy
from medusa_export.heads.head_module import MedusaHeads
from medusa_export.heads.hidden_cache import NO_LABEL, Rows

HEAD_WEIGHT = 0.8  # loss weight of head h is HEAD_WEIGHT ** h (arXiv 2401.10774, 2.2.1)
EVALUATED_ROWS = 20_000

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TrainArguments:
    """How heads are trained.

    Attributes:
        epochs: passes over all rows.
        lr: the largest learning rate; it rises over ``warmup`` of the steps and falls as a cosine to 0.
        batch_rows: positions a step.
        distill: share of the loss that is the base model's own distribution; the rest is the token that came.
        vocab: tokens that the loss is taken over, the most frequent labels; 0 for all.
        patience: epochs without a better held-out accuracy after which training ends; the best heads are kept.
    """

    epochs: int = 3
    lr: float = 1e-3
    batch_rows: int = 1024
    warmup: float = 0.05
    weight_decay: float = 0.01
    distill: float = 0.5
    vocab: int = 8192
    patience: int = 2
    seed: int = 0


def train_heads(
    heads: MedusaHeads,
    rows: Rows,
    held: Rows,
    arguments: TrainArguments,
    progress: Progress = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Train ``heads`` in place; they end as they were after the epoch that was best on the held-out rows.

    Args:
        progress: called with (steps done, steps in all).

    Returns:
        an entry an epoch: mean training loss (nats a label, heads weighted), held-out accuracies.

    Raises:
        ConfigError: a loss that is not finite, or arguments that train nothing.
    """
    if arguments.epochs < 1 or arguments.batch_rows < 1 or not 0 <= arguments.distill <= 1:
        raise ConfigError("training", f"{arguments}", "at least one epoch and row, distill 0 .. 1", "change it")
    labels = rows.labels(heads.num_heads)
    tokens, index_of = _vocabulary(labels, heads.lm_head.shape[0], arguments.vocab)
    chance = torch.Generator().manual_seed(arguments.seed)
    steps = arguments.epochs * math.ceil(len(rows) / arguments.batch_rows)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=arguments.lr, weight_decay=arguments.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, arguments.warmup))
    history: list[dict[str, Any]] = []
    best, best_state, done = -1.0, dict[str, torch.Tensor](), 0
    for _ in range(arguments.epochs):
        losses = []
        for batch in torch.randperm(len(rows), generator=chance).split(arguments.batch_rows):
            loss = _loss(heads, rows, labels, batch.sort().values, tokens, index_of, arguments.distill)
            if not math.isfinite(loss.item()):
                raise ConfigError("training", f"a loss of {loss.item()} at step {done}", "a finite one", "lower --lr")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            done += 1
            progress(done, steps)
        found = accuracies(head_ranks(heads, held, limit=EVALUATED_ROWS))
        history.append({"loss": sum(losses) / len(losses), "heads": found})
        if mean_accuracy(found) > best:
            best = mean_accuracy(found)
            best_state = {name: value.clone() for name, value in heads.state_dict().items()}
            stale = 0
        else:
            stale += 1
            if stale >= arguments.patience:
                break
    heads.load_state_dict(best_state)
    return history


def _loss(
    heads: MedusaHeads,
    rows: Rows,
    labels: torch.Tensor,
    batch: torch.Tensor,
    tokens: torch.Tensor,
    index_of: torch.Tensor,
    distill: float,
) -> torch.Tensor:
    """Mean loss of the labels of one batch of rows, heads weighted.  # int64 [R] -> scalar"""
    hidden = rows.read(batch)
    lm_head = heads.lm_head[tokens]  # [V', D]
    total, weights = hidden.new_zeros(()), 0.0
    for head in range(heads.num_heads):
        label = labels[batch, head]
        label = torch.where(label == NO_LABEL, -1, index_of[label.clamp_min(0)])
        kept = (label >= 0).nonzero()[:, 0]
        if not len(kept):
            continue
        teacher = rows.read(batch[kept] + 1 + head) if distill else None  # where the base model predicts this label
        weight = lm_head if heads.own_lm_head is None else heads.projection(head)[tokens]
        found = chunked_cross_entropy(
            heads(hidden[kept], head), weight, label[kept], teacher=teacher, teacher_weight=lm_head, share=distill
        )
        total = total + HEAD_WEIGHT**head * found / len(kept)
        weights += HEAD_WEIGHT**head
    return total / max(weights, 1.0)


def _vocabulary(labels: torch.Tensor, vocab_size: int, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of the loss, and the place of every token among them or -1.  # int64 [V'], int64 [vocab_size]"""
    counts = torch.bincount(labels[labels != NO_LABEL], minlength=vocab_size)
    tokens = torch.arange(vocab_size) if not 0 < limit < vocab_size else counts.topk(limit).indices.sort().values
    index_of = torch.full((vocab_size,), -1)
    index_of[tokens] = torch.arange(len(tokens))
    return tokens, index_of


def _rate(step: int, steps: int, warmup: float) -> float:
    rising = max(1, int(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
