"""How fast a run was: decoding alone, and whole answers with their prefill, which is the same with and without drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medusa_export.core.intervals import FEWEST as FEWEST  # what reports ask of this module
from medusa_export.core.intervals import bootstrap
from medusa_export.engines.bench.runner import PromptResult

MODES = ("baseline", "medusa")
ALL_MODES = (*MODES, "other_baseline", "other_medusa")

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TimedPart:
    """A part of an answer that is timed for itself.

    Attributes:
        tokens: of a prompt's answer in a mode.
        ms: its median time there.
    """

    tokens: Callable[[PromptResult, str], int]
    ms: Callable[[PromptResult, str], float]


WHOLE = TimedPart(PromptResult.tokens, PromptResult.total_ms)
DECODING = TimedPart(PromptResult.decoded_tokens, PromptResult.decode_ms)


def tokens_per_second(
    prompts: Sequence[PromptResult], part: TimedPart, modes: Sequence[str] = MODES
) -> dict[str, float]:
    """Tokens over the sum of the prompts' times, by mode; none where no prompt has any in every mode.

    Args:
        prompts: that were run in these modes.
        part: what is counted and timed.
        modes: that are to be compared: all of them get the same prompts.
    """
    sums = _rows(prompts, part, modes).sum(0)
    return {mode: float(1e3 * sums[2 * at] / sums[2 * at + 1]) for at, mode in enumerate(modes) if sums[2 * at]}


def speedup(prompts: Sequence[PromptResult], part: TimedPart, mode: str = "medusa") -> float | None:
    """Ratio of throughputs; None where no prompt has such tokens both ways.

    Args:
        prompts: that were run in both modes.
        part: what is counted and timed.
        mode: that is compared with decoding without Medusa.
    """
    found = tokens_per_second(prompts, part, ("baseline", mode))
    return found[mode] / found["baseline"] if found else None


def speedup_interval(
    prompts: Sequence[PromptResult], part: TimedPart, seed: int, fewest: int = FEWEST
) -> list[float] | None:
    """Percentile bootstrap over prompts of the speed-up with drafts, 95 %; None where too few prompts have such tokens.

    Args:
        prompts: that were run in both modes.
        part: what is counted and timed.
        seed: of the draws.
        fewest: prompts.
    """
    rows = _rows(prompts, part, MODES)
    if len(rows) < fewest:
        return None
    return [round(value, 4) for value in bootstrap(rows, ratio, seed=seed)]


def ratio(tokens: Array, ms: Array, own_tokens: Array, own_ms: Array) -> Array:
    """Throughput of the second over that of the first.

    Args:
        tokens: of the first.  # any shape, as all of them
        ms: that they took.
        own_tokens: of the second.
        own_ms: that they took.
    """
    return own_tokens / own_ms / (tokens / ms)


def interval_text(interval: Sequence[float] | None) -> str:
    """1.12 .. 1.22, and a dash where there is none."""
    return "-" if interval is None else f"{interval[0]:.2f} .. {interval[1]:.2f}"


def times_text(times: float | None) -> str:
    """1.12x, and a dash where there is none."""
    return "-" if times is None else f"{times:.2f}x"


def rate_text(rate: float | None) -> str:
    """Tokens a second, and a dash where none were decoded."""
    return "-" if rate is None else f"{rate:.1f}"


def with_interval(times: float | None, interval: Sequence[float] | None, *, name: str = "") -> str:
    """1.12x (1.02 .. 1.22), without the bracket where there is no interval, and a dash where nothing is known.

    Args:
        times: the ratio.
        interval: of it.
        name: of the interval: 1.12x (95%: 1.02 .. 1.22).
    """
    if times is None or interval is None:
        return times_text(times)
    return f"{times_text(times)} ({f'{name}: ' if name else ''}{interval_text(interval)})"


def _rows(prompts: Sequence[PromptResult], part: TimedPart, modes: Sequence[str]) -> Array:
    """Tokens and milliseconds of every mode; without the prompts that have none in one: an answer of one token was not decoded.

    Returns:
        a row a prompt.  # [P, 2 * modes]
    """
    rows = [
        [value for mode in modes for value in (part.tokens(prompt, mode), part.ms(prompt, mode))] for prompt in prompts
    ]
    return np.array([row for row in rows if all(row)], dtype=np.float64).reshape(-1, 2 * len(modes))
