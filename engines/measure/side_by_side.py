"""Trees side by side on an engine: decoding without one and with each, interleaved, prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from medusa_export.core.intervals import FEWEST, bootstrap
from medusa_export.engines.decoding.drafters import Drafter
from medusa_export.engines.decoding.generate import generate
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE, StepEngine
from medusa_export.heads.trees.tree import Tree

WARMUP_TOKENS = 16

Way = TypeVar("Way", bound=Tree | Drafter)
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Measured(Generic[Way]):
    """A tree's decoding against decoding without one, on the same prompts, the prefill not counted.

    Attributes:
        speedup: ratio of decoded tokens per second; None where every answer has one token, which the prefill gives.
        interval: 95 %, over prompts; None where it is of too few of them.
        tokens_per_step: of the tree's runs; None where there was no step.
    """

    tree: Way
    speedup: float | None
    interval: tuple[float, float] | None
    tokens_per_step: float | None


def compare(
    engine: StepEngine,
    trees: Sequence[Way],
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    repeats: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Measured[Way]]:
    """Measure trees or other drafters, in their order.

    Args:
        prompts: input_ids of each.
        repeats: runs of each tree on each prompt; the median counts.
    """
    modes: list[Tree | Drafter] = [AUTOREGRESSIVE, *trees]
    eos = engine.info.eos_token_ids
    for tree in modes:
        generate(engine, prompts[0], tree, max_new_tokens=WARMUP_TOKENS, eos_token_ids=())
    times = np.zeros((repeats, len(prompts), len(modes)))  # ms a decoded token
    counts = np.zeros((len(prompts), len(modes), 2))  # tokens and steps
    for repeat in range(repeats):
        for number, input_ids in enumerate(prompts):
            for turn in range(len(modes)):
                mode = (turn + number + repeat) % len(modes)
                result = generate(engine, input_ids, modes[mode], max_new_tokens=max_new_tokens, eos_token_ids=eos)
                times[repeat, number, mode] = result.decode_ms
                counts[number, mode] = len(result.tokens) - 1, len(result.accepted)
            progress(repeat * len(prompts) + number + 1, repeats * len(prompts))
    return [_measured(tree, np.median(times, 0), counts, mode) for mode, tree in enumerate(trees, start=1)]


def _measured(tree: Way, ms: Array, counts: Array, mode: int) -> Measured[Way]:
    rows = np.stack([counts[:, 0, 0], ms[:, 0], counts[:, mode, 0], ms[:, mode]], axis=1)
    rows = rows[(rows > 0).all(axis=1)]  # without answers of one token: their time is not that of any step
    if not len(rows):
        return Measured(tree, None, None, None)

    def speedup(base_tokens: Array, base_ms: Array, own_tokens: Array, own_ms: Array) -> Array:
        return (own_tokens / own_ms) / (base_tokens / base_ms)

    tokens, steps = counts[:, mode].sum(0)
    interval = bootstrap(rows, speedup) if len(rows) >= FEWEST else None
    return Measured(tree, float(speedup(*rows.sum(0))), interval, float(tokens / steps))
