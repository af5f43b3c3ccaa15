"""Flags of training on cached hidden states."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from medusa_export.core.errors import ConfigError
from medusa_export.core.flags import COUNT, NUMBER, POSITIVE, SHARE, flag
from medusa_export.heads.training.arguments import HEADS, OPTIMIZATION, SharedArguments

DEFAULT_WAY = "training without --reference, --joint and --quant"


@dataclass(frozen=True)
class TrainArguments(SharedArguments):
    """How heads are trained. Steps are optimizer steps.

    Attributes:
        lr: the largest learning rate; it rises over ``warmup`` of the steps and falls as a cosine to 0.
        batch_rows: positions per step.
        distill: share of the loss against the base model's distribution; the rest is against the token that came.
        vocab: take the loss over this many of the most frequent labels; 0: over all tokens.
        bf16: compute products with the vocabulary in bfloat16.
        patience: epochs; the best heads are kept in any case.
        start_share: how much of the heads that the training starts from is in the result, an average of weights; 0: nothing.
    """

    epochs: float = 3.0
    lr: float = flag(
        1e-3, help="Learning rate: of the heads, or with --joint of the base model.", panel=OPTIMIZATION,
        default="0.001; 0.002 with --reference or --quant; 0.0005 with --joint, 2e-05 if it trains all weights", bounds=POSITIVE,
    )  # fmt: skip
    batch_rows: int = flag(
        1024,
        help="Positions per step.",
        panel=OPTIMIZATION,
        name="--batch-tokens",
        requires=DEFAULT_WAY,
        bounds=NUMBER,
    )
    warmup: float = 0.05
    weight_decay: float = 0.01
    distill: float = flag(
        0.0,
        help="Share of the loss that is the base model's own distribution.",
        panel=OPTIMIZATION,
        requires=DEFAULT_WAY,
        bounds=COUNT,
    )
    vocab: int = flag(
        0, help="Take the loss over the N most frequent tokens only, which is faster.", panel=OPTIMIZATION,
        name="--loss-vocab", metavar="N", default="all", requires=DEFAULT_WAY, bounds=COUNT,
    )  # fmt: skip
    start_share: float = flag(
        0.0, help="Average the result with the heads of --heads, which have this share: they forget less.",
        panel=OPTIMIZATION, metavar="SHARE", requires=DEFAULT_WAY, bounds=SHARE,
    )  # fmt: skip
    log_every: int = 10

    def check(self) -> None:
        """Raise ConfigError for values that train nothing."""
        for name in ("batch_rows", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise _error(name, getattr(self, name), "at least 1")
        for name in ("vocab", "patience", "weight_decay"):
            if getattr(self, name) < 0:
                raise _error(name, getattr(self, name), "0 or more")
        for name in ("epochs", "lr"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise _error(name, getattr(self, name), "a number above 0")
        if not 0 <= self.distill <= 1:
            raise _error("distill", self.distill, "0 .. 1")
        if not 0 <= self.start_share < 1:
            raise _error("start_share", self.start_share, "0 or more, and below 1")
        if not 0 <= self.warmup < 1:
            raise _error("warmup", self.warmup, "0 or more, and below 1")
        if self.max_steps is not None and self.max_steps < 1:
            raise _error("max_steps", self.max_steps, "at least 1")

    def recorded(self) -> dict[str, Any]:
        """JSON of everything that shapes the result."""
        return asdict(self)


@dataclass(frozen=True)
class HeadShape:
    """Heads, residual blocks of each, and whether each has a vocabulary projection of its own ("version 1")."""

    num_heads: int = flag(4, help="Medusa heads.", panel=HEADS, default="as many as HEADS has, or 4", bounds=NUMBER)
    num_layers: int = flag(
        1, help="Residual blocks of each head.", panel=HEADS, default="as many as HEADS has, or 1", bounds=NUMBER
    )
    own_lm_head: bool = False

    def check(self) -> None:
        """Raise ConfigError for a shape without heads or layers."""
        for name in ("num_heads", "num_layers"):
            if getattr(self, name) < 1:
                raise _error(name, getattr(self, name), "at least 1")


def _error(name: str, got: object, expected: str) -> ConfigError:
    return ConfigError(name, str(got), expected, "correct it")
