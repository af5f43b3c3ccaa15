"""Training of heads on a frozen base, from cached hidden states: no pass through the base model, whatever the number of epochs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from medusa_export.core.errors import ConfigError
from medusa_export.heads.training.cached.arguments import TrainArguments
from medusa_export.heads.training.cached.objective import BatchLoss, Objective, batches
from medusa_export.heads.training.cached.state import TrainState, load_state, save_state
from medusa_export.heads.training.head_module import MedusaHeads
from medusa_export.heads.training.hidden_states import Rows
from medusa_export.heads.training.metrics import head_ranks
from medusa_export.heads.trees.acceptance import accuracies, mean_accuracy

EVALUATED_ROWS = 4096

Progress = Callable[[int, int], None]


def train_heads(
    heads: MedusaHeads,
    rows: Rows,
    held: Rows,
    arguments: TrainArguments,
    *,
    checkpoint: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> TrainState:
    """Train ``heads`` in place, and keep the epoch that is best on the held-out rows.

    Args:
        held: held-out rows; the first few thousand are measured after every epoch.
        checkpoint: file of the state; where it exists, training continues from it and ends with the same heads.
        progress: called with (steps done, steps in all).

    Returns:
        what happened: losses (nats a row, heads weighted) by step, accuracies by epoch.

    Raises:
        ConfigError: a loss that is not finite, or arguments that train nothing.
    """
    arguments.check()
    trainer = _Trainer(heads, rows, held, arguments, checkpoint, progress)
    return trainer.run()


class _Trainer:
    def __init__(
        self,
        heads: MedusaHeads,
        rows: Rows,
        held: Rows,
        arguments: TrainArguments,
        checkpoint: Path | None,
        progress: Progress,
    ) -> None:
        self._heads, self._rows, self._held = heads, rows, held
        self._arguments, self._checkpoint, self._progress = arguments, checkpoint, progress
        labels = rows.labels(heads.num_heads)
        dtype = torch.bfloat16 if arguments.bf16 else torch.float32
        size = heads.lm_head.shape[0]
        objective = Objective.over(labels, size, vocab=arguments.vocab, distill=arguments.distill, dtype=dtype)
        self._loss = BatchLoss(heads, rows, objective)
        self._steps_an_epoch = math.ceil(len(rows) / arguments.batch_rows)
        self._steps = arguments.max_steps or math.ceil(arguments.epochs * self._steps_an_epoch)
        self._optimizer = torch.optim.AdamW(heads.parameters(), lr=arguments.lr, weight_decay=arguments.weight_decay)

    def run(self) -> TrainState:
        state = TrainState()
        if self._checkpoint is not None and self._checkpoint.exists():
            state = load_state(self._checkpoint, self._heads, self._optimizer)
        while state.step < self._steps and not state.stopped:
            epoch, first = divmod(state.step, self._steps_an_epoch)
            order = batches(len(self._rows), self._arguments.batch_rows, self._arguments.seed, epoch)
            for batch in order[first:]:
                self._step(batch, state)
                if state.step == self._steps:
                    break
                if self._checkpoint is not None and state.step % self._arguments.checkpoint_every == 0:
                    save_state(self._checkpoint, self._heads, self._optimizer, state)
            self._evaluate(state)
        self._heads.load_state_dict(state.best)
        return state

    def _step(self, batch: torch.Tensor, state: TrainState) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._arguments.lr * _rate(state.step, self._steps, self._arguments.warmup)
        self._optimizer.zero_grad()
        loss = self._loss.backward(batch)
        if not math.isfinite(loss):
            raise ConfigError("training", f"a loss of {loss} at step {state.step}", "a finite one", "lower --lr")
        self._optimizer.step()
        state.add(loss, log_every=self._arguments.log_every)
        self._progress(state.step, self._steps)

    def _evaluate(self, state: TrainState) -> None:
        """Look at held-out rows, and remember the heads if they are the best so far."""
        if state.step % self._steps_an_epoch and state.step != self._steps:
            return
        found = accuracies(head_ranks(self._heads, self._held, limit=EVALUATED_ROWS))
        accuracy = mean_accuracy(found)
        state.epochs.append({"step": state.step, "heads": found})
        if accuracy > state.best_accuracy or not state.best:
            state.best_accuracy, state.stale = accuracy, 0
            state.best = {name: value.detach().clone() for name, value in self._heads.state_dict().items()}
        else:
            state.stale += 1
            state.stopped = 0 < self._arguments.patience <= state.stale
        if self._checkpoint is not None:
            save_state(self._checkpoint, self._heads, self._optimizer, state)


def _rate(step: int, steps: int, warmup: float) -> float:
    rising = max(1, int(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _error(name: str, got: object, expected: str) -> ConfigError:
    return ConfigError(name, str(got), expected, "correct it")
