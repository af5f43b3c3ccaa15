"""Flags of training with the whole model: their checks, and their form for Hugging Face's Trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa_export.core.errors import ConfigError
from medusa_export.core.flags import COUNT, NUMBER, POSITIVE, SHARE, flag
from medusa_export.heads.training.arguments import HEADS, OPTIMIZATION, RUN, SharedArguments

if TYPE_CHECKING:
    from transformers import TrainingArguments

BASES = {"frozen": False, "joint": True}  # whether the base model is trained


@dataclass(frozen=True)
class HeadsLayout:
    """How trained heads are stored.

    Attributes:
        description: for --help.
        holds_own, holds_shared: whether there is a place for lm_heads of the heads' own, and whether the base's may stand for them.
        holds_base: whether the base model is in the same checkpoint.
    """

    description: str
    holds_own: bool = True
    holds_shared: bool = True
    holds_base: bool = False


LAYOUTS: dict[str, HeadsLayout] = {
    "v1": HeadsLayout("each head has its own lm_head", holds_shared=False),
    "v2": HeadsLayout("heads share the base's lm_head", holds_own=False),
    "modelopt": HeadsLayout("one checkpoint with the base; with --reference, --joint or --quant", holds_base=True),
}
DEFAULT_LAYOUT = "v2"
BEST_METRIC = "eval_head0_top1"
# Of the base model. Adapters: arXiv 2401.10774, appendix B.2; all weights: what fine-tuning of chat models commonly takes.
ADAPTER_RATE, FULL_RATE = 5e-4, 2e-5
# How the heads' share of the loss grows over the joint stage, 0 .. 1 -> 0 .. 1. FasterDecoding's trainer knows the sine.
RAMPS: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: done,
    "sine": lambda done: math.sin(done * math.pi / 2),
}


WITH_MODEL, JOINT = "--reference, --joint or --quant", "--joint"
PANEL = "Training the base model (--joint)"  # heading of --help


@dataclass(frozen=True)
class ReferenceArguments(SharedArguments):
    """How heads are trained, with the base model as it is ("frozen", Medusa-1) or along with it ("joint", Medusa-2).

    Source of the defaults: arXiv 2401.10774, sections 2.2.2 and 2.3.2. Steps are optimizer steps.

    Attributes:
        base: "frozen" or "joint".
        heads, layers: heads, and residual blocks of each.
        layout: "v1" (every head has its own lm_head), "v2" (all share the base's) or "modelopt" (one checkpoint with the base).
        share_lm_head: the heads' lm_head is the base's and is not trained for them; None: as the layout stores it.
        batch_size: sequences of a micro-batch, in every process.
        accumulate: micro-batches of a step.
        learning_rate: of the base model; None: 5e-4 for adapters, 2e-5 for all weights.
        head_lr_factor: times it, the heads' rate.
        schedule, warmup: of both rates: a scheduler of transformers, and the share of steps on which they rise.
        warmup_heads: joint: share of the steps on which the heads alone are trained, first.
        head_decay: head ``h`` weighs head_decay ** h in the loss.
        heads_weight, ramp: joint: weight of all heads against the base's loss, and how it is reached: "constant", "linear", "sine".
        lora_rank: joint: rank of the base's adapters, merged in the end; 0 trains all weights.
        distill: joint: the base is held to its own predictions from before the training; otherwise to the text.
        bf16: what is trained stays float32, and so does all of the base where it is trained.
        gradient_checkpointing: compute the base's activations twice instead of keeping them.
        checkpoint_every: steps between evaluations too, where there is held-out data.
        patience: counts the top-1 accuracy of head 0; the best heads are taken.
        report_to: trackers of transformers, for instance "tensorboard".
        trainer: further ``TrainingArguments``, for instance fsdp and fsdp_config.
    """

    base: str = "frozen"
    heads: int = flag(4, help="Medusa heads.", panel=HEADS, name="--num-heads", bounds=NUMBER)
    layers: int = flag(1, help="Residual blocks of each head.", panel=HEADS, name="--num-layers", bounds=NUMBER)
    layout: str = flag(
        DEFAULT_LAYOUT, help="Layout of the heads' checkpoint.", panel=HEADS,
        choices={name: row.description for name, row in LAYOUTS.items()},
    )  # fmt: skip
    share_lm_head: bool | None = None
    batch_size: int = flag(
        8, help="Conversations per micro-batch.", panel=OPTIMIZATION, requires=WITH_MODEL, bounds=NUMBER
    )
    accumulate: int = flag(1, help="Micro-batches per step.", panel=OPTIMIZATION, requires=WITH_MODEL, bounds=NUMBER)
    learning_rate: float | None = flag(
        None, help="Learning rate of the base model.", panel=OPTIMIZATION, name="--lr", bounds=POSITIVE
    )
    head_lr_factor: float = flag(
        4.0, help="The heads' learning rate as a multiple of the base's.", panel=PANEL, requires=JOINT, bounds=COUNT
    )
    schedule: str = "cosine"
    warmup: float = 0.03
    max_grad_norm: float = 1.0
    warmup_heads: float = flag(
        0.2,
        help="Share of the steps that train the heads alone, at first.",
        panel=PANEL,
        requires=JOINT,
        bounds=SHARE,
    )
    head_decay: float = 0.8
    heads_weight: float = flag(
        0.2, help="Weight of the heads in the joint loss.", panel=PANEL, requires=JOINT, bounds=COUNT
    )
    ramp: str = flag(
        "constant", help="Schedule that raises --heads-weight.", panel=PANEL, choices=tuple(RAMPS), requires=JOINT
    )
    lora_rank: int = flag(
        16,
        help="Rank of the base model's adapters; 0: train all weights.",
        panel=PANEL,
        requires=JOINT,
        bounds=COUNT,
    )
    distill: bool = flag(
        True, help="Hold the base model to its own predictions, rather than to the text.", panel=PANEL, name="--hold-base",
        opposite="--no-hold-base", requires=JOINT,
    )  # fmt: skip
    gradient_checkpointing: bool = flag(
        False, help="Save memory by computing activations twice.", panel=RUN, requires=WITH_MODEL
    )
    log_every: int = 10
    report_to: tuple[str, ...] = ("tensorboard",)
    trainer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trains_base(self) -> bool:
        """Whether the base model changes."""
        return BASES[self.base]

    @property
    def uses_adapters(self) -> bool:
        """Whether it changes through low-rank adapters."""
        return self.trains_base and self.lora_rank > 0

    @property
    def shares_lm_head(self) -> bool:
        """Whether the heads use the base's own lm_head."""
        return not LAYOUTS[self.layout].holds_own if self.share_lm_head is None else self.share_lm_head

    @property
    def base_rate(self) -> float:
        """Learning rate of the base model."""
        return self.learning_rate or (FULL_RATE if self.trains_base and not self.lora_rank else ADAPTER_RATE)

    @property
    def head_rate(self) -> float:
        """Learning rate of the heads."""
        return self.base_rate * self.head_lr_factor

    @property
    def head_weights(self) -> tuple[float, ...]:
        """Weights of the heads in the loss."""
        return tuple(self.head_decay**head for head in range(self.heads))

    def check(self) -> None:
        """Raise ConfigError where two arguments contradict each other, or one has no sense."""
        for name, table in (("base", BASES), ("layout", LAYOUTS), ("ramp", RAMPS)):
            if getattr(self, name) not in table:
                raise _error(name, getattr(self, name), f"one of {', '.join(table)}")
        for name in ("heads", "layers", "batch_size", "accumulate", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise _error(name, getattr(self, name), "at least 1")
        for name in ("warmup_heads", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise _error(name, getattr(self, name), "a share of the steps: 0 or more, and below 1")
        for name in ("epochs", "head_decay", "heads_weight", "head_lr_factor"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise _error(name, getattr(self, name), "a number above 0")
        for name in ("lora_rank", "patience", "weight_decay"):
            if getattr(self, name) < 0:
                raise _error(name, getattr(self, name), "0 or more")
        layout = LAYOUTS[self.layout]
        if self.share_lm_head is False and not layout.holds_own:
            expected = f"true for layout {self.layout}, which has no place for lm_heads"
            raise _error("share_lm_head", False, expected, "use layout v1")
        if self.share_lm_head and not layout.holds_shared:
            expected = f"false for layout {self.layout}, whose heads have their own"
            raise _error("share_lm_head", True, expected, "use layout v2")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise _error("learning_rate", self.learning_rate, "a number above 0")
        if self.max_steps is not None and self.max_steps < 1:
            raise _error("max_steps", self.max_steps, "at least 1")

    def recorded(self) -> dict[str, Any]:
        """JSON of everything that shapes the result, for manifests and for telling whether a training can be resumed."""
        return asdict(self) | {"trainer": dict(self.trainer), "report_to": list(self.report_to)}


def training_arguments(
    arguments: ReferenceArguments, directory: Path, *, steps: int, seed: int, evaluates: bool
) -> TrainingArguments:
    """``TrainingArguments`` of one stage.

    Args:
        arguments: of the whole training.
        directory: of its checkpoints.
        steps: optimizer steps.
        seed: of the order of the data.
        evaluates: there is held-out data.

    Raises:
        ConfigError: transformers refuses them.
    """
    import torch
    from transformers import TrainingArguments

    has_accelerator = torch.accelerator.is_available()
    options: dict[str, Any] = {
        "output_dir": str(directory),
        "seed": seed,
        "data_seed": seed,
        "use_cpu": not has_accelerator,  # bf16 asks to be told
        "dataloader_pin_memory": has_accelerator,
        **_optimization(arguments, steps),
        **_checkpoints(arguments, evaluates),
        **_REPORTING,
        "logging_steps": arguments.log_every,
        "report_to": list(arguments.report_to) or "none",
        **arguments.trainer,
    }
    try:
        made = TrainingArguments(**options)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(
            "training arguments", f"a refusal of transformers ({error})", "arguments that it takes", "correct them"
        ) from error
    made._n_gpu = min(made.n_gpu, 1)  # a process a GPU, through torchrun: DataParallel would split the loss's divisor
    return made


_REPORTING = {
    "logging_nan_inf_filter": False,  # it would show the mean of what was before instead
    "disable_tqdm": True,
    "remove_unused_columns": False,
    "average_tokens_across_devices": True,
    "ddp_find_unused_parameters": False,
}


def _optimization(arguments: ReferenceArguments, steps: int) -> dict[str, Any]:
    return {
        "max_steps": steps,
        "per_device_train_batch_size": arguments.batch_size,
        "per_device_eval_batch_size": arguments.batch_size,
        "gradient_accumulation_steps": arguments.accumulate,
        "learning_rate": arguments.base_rate,
        "lr_scheduler_type": arguments.schedule,
        "warmup_steps": min(math.ceil(arguments.warmup * steps), steps - 1),  # the first of them has a rate of 0
        "weight_decay": arguments.weight_decay,
        "max_grad_norm": arguments.max_grad_norm,
        "bf16": arguments.bf16,
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},  # the other kind needs inputs with gradients
    }


def _checkpoints(arguments: ReferenceArguments, evaluates: bool) -> dict[str, Any]:
    picks_best = evaluates and arguments.patience > 0
    return {
        "save_strategy": "steps",
        "save_steps": arguments.checkpoint_every,
        "save_total_limit": 2,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": arguments.checkpoint_every if evaluates else None,
        "load_best_model_at_end": picks_best,
        "metric_for_best_model": BEST_METRIC if picks_best else None,
        "greater_is_better": True if picks_best else None,
        "restore_callback_states_from_checkpoint": True,  # or patience would start anew
    }


def _error(name: str, got: object, expected: str, action: str = "correct it") -> ConfigError:
    return ConfigError(name, str(got), expected, action)
