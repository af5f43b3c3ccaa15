"""Hugging Face's Trainer for Medusa heads: two learning rates, checkpoints of what is trained only, an end at the first NaN."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import EvalPrediction

from medusa_export.core.errors import ConfigError, OutputError
from medusa_export.heads.training.full.arguments import ReferenceArguments
from medusa_export.heads.training.full.model import Collator, MedusaTraining

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"


class MedusaTrainer(Trainer):
    """The Trainer with a learning rate of the heads' own, checkpoints of what is trained only, and an end at the first NaN.

    Args:
        model: what is trained has gradients enabled.
        arguments: learning rates.
        progress: called with (steps done, steps in all).
        options: of Trainer.
    """

    def __init__(
        self,
        model: MedusaTraining,
        arguments: ReferenceArguments,
        *,
        progress: Callable[[int, int], None] = lambda done, total: None,
        **options: Any,
    ) -> None:
        self._rates = {"base": arguments.base_rate, "heads": arguments.head_rate}
        self._trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        super().__init__(model, data_collator=Collator(), compute_metrics=metrics, **options)
        if self.args.fsdp and not self.is_fsdp_enabled:  # on CPUs the Trainer would go on without it
            raise ConfigError("fsdp", "no GPUs", "a GPU a process", "leave it out, or run under torchrun on GPUs")
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ConfigError("fsdp_config", "version 1", "version 2, the one this was tested with", "set version to 2")
        self.remove_callback(PrinterCallback)  # a command's stdout is for its result
        self.add_callback(_ProgressCallback(model, progress))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW, or whatever the arguments name, on two groups of parameters."""
        if self.optimizer is None:
            module: Any = self.model if model is None else model
            groups: dict[str, list[Any]] = {name: [] for name in self._rates}
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    groups["heads" if ".medusa_heads." in name else "base"].append(parameter)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, module)
            rates = {"weight_decay": self.args.weight_decay, **options}
            self.optimizer = kind(
                [{"params": group, "lr": self._rates[name]} for name, group in groups.items() if group], **rates
            )
        return self.optimizer

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """As in the base class, with a ConfigError before a loss that is not finite reaches the weights.

        Args:
            model: what is trained.
            inputs: one micro-batch.
            num_items_in_batch: tokens of all micro-batches of the step, as the Trainer counts them.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not bool(torch.isfinite(loss)):
            raise ConfigError(
                f"training step {self.state.global_step + 1}",
                f"a loss of {float(loss)}",
                "a finite number",
                "lower the learning rate, or check model and data for NaN",
            )
        return loss

    def save_trained(self, path: Path) -> None:
        """Write what this stage trains, by its name in :class:`MedusaTraining`; all processes have to call it."""
        module: Any = self.model
        state = self.accelerator.get_state_dict(module) if self.is_fsdp_enabled else module.state_dict()
        if self.is_world_process_zero():
            self._write(state, path)
        self.accelerator.wait_for_everyone()

    def _write(self, state: dict[str, torch.Tensor], path: Path) -> None:
        scratch = path.with_suffix(".partial")
        tensors = {name: state[name].detach().cpu().contiguous() for name in self._trained}
        save_file(tensors, scratch, {"format": "pt"})
        scratch.rename(path)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A checkpoint without the weights that do not change."""
        directory = Path(output_dir or str(self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        module: Any = self.model
        self._write(module.state_dict() if state_dict is None else state_dict, directory / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained(self.model, Path(resume_from_checkpoint) / WEIGHTS)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            load_trained(self.model, Path(str(self.state.best_model_checkpoint)) / WEIGHTS)


def load_trained(model: Any, path: Path) -> None:
    """Put what :meth:`MedusaTrainer.save_trained` wrote back into the model.

    Raises:
        OutputError: the file has a tensor that the model does not train.
    """
    stray = model.load_state_dict(load_file(path), strict=False).unexpected_keys
    if stray:
        raise OutputError(str(path), f"a tensor {stray[0]}", "those of this training", "delete it and train again")


class _ProgressCallback(TrainerCallback):
    """Tells the loss, the user and the log how far the stage is."""

    def __init__(self, model: MedusaTraining, progress: Callable[[int, int], None]) -> None:
        self._progress, self._show = model.progress, progress

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._progress.done = state.global_step / max(state.max_steps, 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._show(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logger.info("step %d: %s", state.global_step, logs)


def metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Top-1 accuracy and mean negative log likelihood (nats a token) of base and heads; ``loss`` is the unweighted sum.

    ``base_kl`` is the mean divergence from the teacher (nats a token), 0 without one.
    """
    parts, drift = (torch.as_tensor(values, dtype=torch.float64) for values in prediction.predictions)
    targets, hits, nll = parts.sum(0).T  # [1 + heads] each
    count = targets.clamp_min(1)
    names = ["base", *(f"head{head}" for head in range(len(targets) - 1))]
    found = {f"{name}_top1": float(value) for name, value in zip(names, hits / count, strict=True)}
    found |= {f"{name}_nll": float(value) for name, value in zip(names, nll / count, strict=True)}
    return found | {"base_kl": float(drift.sum() / count[0]), "loss": float((nll / count).sum())}
