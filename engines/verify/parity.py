"""Is the output of the tree the output of plain decoding? Judged per prompt, on the same engine.

A tree step sums the same products in another order than a single step does, so logits differ by floating-point noise, and a near tie
may fall the other way. How large that noise is, is measured on the engine at hand, never assumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from medusa_export.engines.decoding.protocols import Generation
from medusa_export.heads.decoding.sampling import Sampler


class Scorer(Protocol):
    """An engine that can give the logits of a text."""

    def score(self, input_ids: Sequence[int], *, chunk: int, start: int = 0) -> Iterable[npt.NDArray[np.float32]]:
        """Logits of consecutive tokens, ``chunk`` a run.

        Args:
            input_ids: the text.
            chunk: tokens of a run.
            start: first token whose next-token logits are wanted.
        """


@dataclass(frozen=True)
class Divergence:
    """The first place where two outputs of one prompt part.

    Attributes:
        position: index among the generated tokens.
        baseline_token, medusa_token: what each chose; None where an output had already ended.
        logit_gap: the baseline token's logit minus the other's, in the autoregressive run; None without two tokens.
    """

    position: int
    baseline_token: int | None
    medusa_token: int | None
    logit_gap: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def first_divergence(baseline: Generation, medusa: Generation) -> int | None:
    """Index of the first token that differs, or where the shorter output ends; None when tokens and reasons agree."""
    pairs = zip(baseline.tokens, medusa.tokens, strict=False)
    different = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    if different is not None:
        return different
    if len(baseline.tokens) == len(medusa.tokens) and baseline.finish_reason == medusa.finish_reason:
        return None
    return min(len(baseline.tokens), len(medusa.tokens))


def explain(
    engine: Scorer, prompt: Sequence[int], baseline: Generation, medusa: Generation, sampler: Sampler | None = None
) -> Divergence | None:
    """The first divergence with the logit gap that decided it, or None where the outputs are exactly equal.

    Args:
        sampler: what both were drawn with; the gap is then how far logits would have to move for the other token.
    """
    at = first_divergence(baseline, medusa)
    if at is None:
        return None
    ours = baseline.tokens[at] if at < len(baseline.tokens) else None
    theirs = medusa.tokens[at] if at < len(medusa.tokens) else None
    if ours is None or theirs is None:
        return Divergence(at, ours, theirs, None)
    text = [*prompt, *baseline.tokens[:at]]
    *_, last = engine.score(text, chunk=1, start=min(len(prompt), len(text) - 1))
    if sampler:
        return Divergence(at, ours, theirs, sampler.margin(at, last[-1], theirs))
    return Divergence(at, ours, theirs, float(last[-1, ours] - last[-1, theirs]))


def verdict(divergence: Divergence | None, tolerance: float) -> str:
    """ "exact", "tie" (the gap lies within the measured noise) or "mismatch"; an output that ends early is a mismatch."""
    if divergence is None:
        return "exact"
    gap = divergence.logit_gap
    return "tie" if gap is not None and 0 <= gap <= tolerance else "mismatch"


def logit_noise(engine: Scorer, prompt: Sequence[int], answer: Sequence[int], num_nodes: int) -> float:
    """How much the gap between the best two tokens moves between single steps and causal blocks of ``num_nodes``.

    The gap is what decides a near tie; a shift that all logits share does not. The block is causal and has no tree in it, so a
    wrong mask, parent or position cannot hide in what this measures.

    Args:
        engine: gives logits of a given text.
        prompt: token ids.  # [P]
        answer: token ids.  # [A]
        num_nodes: tokens of a block.

    Returns:
        The largest movement over the answer's positions, in logits.
    """
    text, start = [*prompt, *answer], len(prompt)
    chunk = min(num_nodes, len(answer))
    if chunk <= 1:
        return 0.0
    single = np.concatenate(list(engine.score(text, chunk=1, start=start)))  # [answer, V]
    block = np.concatenate(list(engine.score(text, chunk=chunk, start=start)))
    best_two = np.argpartition(single, -2, axis=-1)[:, -2:]  # [answer, 2]
    gaps = [np.diff(np.take_along_axis(logits, best_two, axis=-1), axis=-1) for logits in (single, block)]
    return float(np.abs(gaps[0] - gaps[1]).max())
