"""Flags that every kind of training has."""

from __future__ import annotations

from dataclasses import dataclass

from medusa_export.core.flags import COUNT, NUMBER, POSITIVE, flag

OPTIMIZATION, RUN, HEADS = "Optimization", "Run", "Heads"  # headings of --help


@dataclass(frozen=True)
class SharedArguments:
    """Length, precision and checkpoints of a training.

    Attributes:
        epochs: passes over the data.
        max_steps: optimizer steps; wins over the epochs.
        bf16: compute in bfloat16.
        patience: evaluations without a better held-out accuracy after which training ends; 0: never.
        checkpoint_every: steps between checkpoints.
    """

    epochs: float = flag(
        1.0,
        help="Passes over the data.",
        panel=OPTIMIZATION,
        default="3; 1 with --reference, --joint or --quant",
        bounds=POSITIVE,
    )
    max_steps: int | None = flag(None, help="Optimizer steps; wins over --epochs.", panel=OPTIMIZATION, bounds=NUMBER)
    weight_decay: float = flag(
        0.0,
        help="AdamW weight decay.",
        panel=OPTIMIZATION,
        default="0.01; 0 with --reference, --joint or --quant",
        bounds=COUNT,
    )
    bf16: bool = flag(False, help="Compute in bfloat16.", panel=RUN)
    seed: int = flag(0, help="Seed for the order of the data.", panel=RUN, bounds=COUNT)
    checkpoint_every: int = flag(200, help="Steps between checkpoints.", panel=RUN, bounds=NUMBER)
    patience: int = flag(
        0,
        help="Stop after N evaluations without better accuracy.",
        panel=RUN,
        metavar="N",
        default="never",
        bounds=COUNT,
    )
