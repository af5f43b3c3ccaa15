"""What the reference training trains: a causal LM in ModelOpt's Medusa form, its adapters, its teacher, and the loss as a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from medusa_export.core.errors import ConfigError, missing_package
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint, load_reference
from medusa_export.heads.training.dataset import Example
from medusa_export.heads.training.full.arguments import RAMPS, ReferenceArguments
from medusa_export.heads.training.full.modelopt_medusa import (
    NO_LABEL,
    base_logits,
    convert,
    load_heads,
    medusa_loss,
    own_head_parameters,
)

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_ALPHA = 2  # times the rank

Batch = Mapping[str, torch.Tensor]
Teacher = Callable[[Batch], torch.Tensor]


class Extension(Protocol):
    """What turns the training into another one: quantization-aware training puts quantizers in and takes them out again.

    With its adapters off the model has to be the base as it was: they are the teacher.
    """

    def recorded(self) -> dict[str, Any]:
        """JSON of everything about it that shapes the result."""

    def prepare(self, model: Any) -> None:
        """Change the model, with its heads and adapters in place and on its device."""

    def finish(self, model: Any, out: Path) -> None:
        """Undo that, after the adapters were merged, and add files to the output."""


class Collator:
    """Examples -> input_ids, attention_mask and labels, padded on the right.  # int64 [B, S] each"""

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        longest = max(len(example.input_ids) for example in examples)
        ids = torch.zeros(len(examples), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, NO_LABEL)
        for row, example in enumerate(examples):
            length = len(example.input_ids)
            ids[row, :length] = torch.tensor(example.input_ids)
            mask[row, :length] = 1
            labels[row, :length] = ids[row, :length].where(torch.tensor(example.answer_mask), NO_LABEL)
        labels[:, 0] = NO_LABEL  # nothing predicts it, and the Trainer counts labels to divide by
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass
class Progress:
    """How much of the stage is done, 0 .. 1; the trainer writes it and the loss reads it, whatever wraps the module."""

    done: float = 0.0


class MedusaTraining(nn.Module):
    """The whole computation of a step in one forward, which is what DDP and FSDP wrap: teacher, base, heads and loss.

    Args:
        model: in ModelOpt's Medusa form; with adapters, what peft wrapped around it is not needed here.
        arguments: weights of the losses.
        freeze_base: this stage trains the heads only.
        teacher: gives the log-probabilities that the base is held to; None holds it to the text.
    """

    accepts_loss_kwargs = (
        True  # num_items_in_batch is honoured, so the Trainer must not divide by the micro-batches again
    )

    def __init__(
        self, model: Any, arguments: ReferenceArguments, *, freeze_base: bool, teacher: Teacher | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.freeze_base, self.teacher = freeze_base, teacher
        self.head_weights, self.progress = arguments.head_weights, Progress()
        self.heads_weight = arguments.heads_weight
        self._ramp = RAMPS[arguments.ramp]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Loss, and the statistics of :class:`~medusa_export.heads.training.full.modelopt_medusa.MedusaLoss`.  # [B, S] each

        Args:
            num_items_in_batch: answer tokens in all micro-batches of the step and all processes.
        """
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        scale = 1.0 if self.freeze_base else self.heads_weight * self._ramp(self.progress.done)
        found = medusa_loss(
            self.model,
            batch,
            freeze_base=self.freeze_base,
            head_weights=[weight * scale for weight in self.head_weights],
            teacher=None if self.teacher is None else self.teacher(batch),
            items=num_items_in_batch,
        )
        return {"loss": found.loss, "parts": found.parts, "drift": found.drift}

    def train(self, mode: bool = True) -> MedusaTraining:
        """As in the base class, but a base that is not trained has no dropout either."""
        super().train(mode)
        if self.freeze_base:
            self.model.model.eval()
        return self

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """What the Trainer calls."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)


@dataclass
class Built:
    """A model to be trained.

    Attributes:
        model: in ModelOpt's Medusa form, adapters and quantizers in place.
        adapters: peft's handle of it, or None.
        teacher: see :class:`MedusaTraining`; None where the base is not held to anything but the text.
    """

    model: Any
    adapters: Any
    teacher: Teacher | None

    def module(self, arguments: ReferenceArguments, *, freeze_base: bool) -> MedusaTraining:
        """The model as one stage trains it."""
        self._set_trained(arguments, freeze_base)
        teacher = None if freeze_base else self.teacher
        return MedusaTraining(self.model, arguments, freeze_base=freeze_base, teacher=teacher)

    def _set_trained(self, arguments: ReferenceArguments, freeze_base: bool) -> None:
        """Let gradients reach exactly what this stage trains; ModelOpt leaves the frozen base's parameters trainable."""
        heads = {id(parameter) for parameter in own_head_parameters(self.model).values()}
        for name, parameter in self.model.named_parameters():
            in_base = not freeze_base and (not arguments.uses_adapters or ".lora_" in name)
            parameter.requires_grad_(id(parameter) in heads or in_base)

    def merge(self) -> None:
        """Add the adapters to the base's weights, in float32, and remove them."""
        self.model.float()
        if self.adapters is not None:
            self.model = self.adapters.merge_and_unload()
            self.adapters = None


def build(
    model_dir: Path,
    arguments: ReferenceArguments,
    *,
    heads: Path | None = None,
    extension: Extension | None = None,
    device: torch.device | str = "cpu",
) -> Built:
    """Load a base model and put heads, adapters and what the extension adds into it.

    Args:
        heads: existing heads to continue from, of as many heads and layers.

    Raises:
        MedusaExportError: a model or heads that cannot be read or do not fit; ModelOpt or peft is missing.
    """
    # Weights that nothing changes are held as they are stored; what extensions do to them is for them to undo.
    is_constant = extension is None and (arguments.uses_adapters or not arguments.trains_base)
    is_stored = DecoderConfig.from_dir(model_dir).dtype == "bfloat16"
    dtype = torch.bfloat16 if arguments.bf16 and is_constant and is_stored else torch.float32
    model = load_reference(model_dir, dtype)
    model.config.use_cache = False
    convert(model, heads=arguments.heads, layers=arguments.layers, share_lm_head=arguments.shares_lm_head)
    for parameter in own_head_parameters(model).values():
        parameter.data = parameter.data.float()
    if heads is not None:
        load_heads(model, _stored_heads(model_dir, heads, arguments))
    adapters = _add_adapters(model, arguments) if arguments.uses_adapters else None
    torch.nn.Module.to(model, device)  # transformers' own annotation of it hides its argument
    if extension is not None:
        extension.prepare(model)
    return Built(model, adapters, _teacher(model_dir, arguments, model, adapters, device))


def _stored_heads(model_dir: Path, path: Path, arguments: ReferenceArguments) -> dict[str, torch.Tensor]:
    """Existing heads by canonical name; where they share the base's projection it counts as each one's own."""
    checkpoint = MedusaCheckpoint.open(model_dir, path)
    if arguments.shares_lm_head and not checkpoint.heads_share_lm_head:
        raise ConfigError(str(path), "heads with lm_heads of their own", "heads without", "train layout v1 from them")
    names = checkpoint.heads.canonical_names()
    return {name: checkpoint.read(name) for name in names if not arguments.shares_lm_head or ".linear." in name}


def _add_adapters(model: Any, arguments: ReferenceArguments) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise missing_package("peft", "train") from error
    names = "|".join(ADAPTED)
    config = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=LORA_ALPHA * arguments.lora_rank,
        target_modules=rf".*\.layers\.\d+\.\w+\.({names})",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.seed)
        return get_peft_model(model, config)


def _teacher(
    model_dir: Path,
    arguments: ReferenceArguments,
    model: Any,
    adapters: Any,
    device: torch.device | str,
) -> Teacher | None:
    """The base as it was: the model without its adapters, or, where all its weights change, a second copy in memory."""
    if not (arguments.trains_base and arguments.distill):
        return None
    if adapters is not None:

        def without_adapters(batch: Batch) -> torch.Tensor:
            with adapters.disable_adapter():
                return base_logits(model, batch)

        return without_adapters
    copy = load_reference(model_dir, torch.bfloat16 if arguments.bf16 else torch.float32, device)
    return lambda batch: base_logits(copy, batch)


def check_examples(examples: Sequence[Example], what: str) -> None:
    """Raise ConfigError for an example that has nothing to learn from: such a batch would have no loss."""
    if not examples:
        raise ConfigError(what, "no examples", "at least one", "give more conversations")
    for number, example in enumerate(examples):
        if not any(example.answer_mask[1:]):
            raise ConfigError(f"{what}, example {number}", "no answer token", "an answer", "leave it out")
