"""One engine against another of the same model, such as quantized against not: tokens, distributions, answers, speed.

Whether a difference over prompts is more than chance is answered by pairs: both engines do the same prompt, and the mean difference
stands with its interval and with the difference that this many prompts would have shown in four of five such comparisons.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medusa_export.core.errors import ConfigError
from medusa_export.core.text.special_tokens import token_ids
from medusa_export.engines.bench.runner import PromptResult
from medusa_export.engines.verify.parity import Scorer, first_divergence
from medusa_export.heads.contract.engine_info import EngineInfo

CHUNK = 64  # tokens a run when a text is scored
NORMAL_95, NORMAL_POWER_80 = 1.96, 0.84  # standard deviations: two-sided 5 %, and four times out of five
WORD = re.compile(r"\w+")

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Compared:
    """A prompt's part in the comparison.

    Attributes:
        positions, agree: tokens of the other engine's answer, and those that this engine would have chosen too.
        kl, nll, other_nll: sums over them, nats: KL(other || this), and what the answer costs under each.
    """

    positions: int
    agree: int
    kl: float
    nll: float
    other_nll: float


def require_comparable(info: EngineInfo, other: EngineInfo) -> None:
    """Raise ConfigError where two engines are not of one model."""
    for name in ("vocab_size", "eos_token_ids"):
        ours, theirs = getattr(info, name), getattr(other, name)
        if ours != theirs:
            raise ConfigError(
                "--compare", f"{name} {theirs}", f"{ours}, as in --engine", "give an engine of the same model"
            )


def compare_engines(
    engine: Scorer,
    other: Scorer,
    prompts: Sequence[PromptResult],
    references: Sequence[str],
    tokenizer: Any,
    *,
    max_length: int,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """What ``medusa-run --compare`` reports besides speed.

    Args:
        engine: this engine.
        other: the one to compare with; its answers are the texts on which both are judged.
        prompts: run on both.
        references: what a person answered to each prompt, or ""; held out from both engines.
        tokenizer: of both.
        max_length: tokens of a prompt and an answer that both take.

    Returns:
        agreement, KL and perplexities on the other's answers; equal outputs; and ``paired``, the differences a prompt.
    """
    rows = []
    for prompt in prompts:
        answer = prompt.other_baseline[0].tokens
        ours, theirs = (scores(each, prompt.input_ids, answer) for each in (engine, other))
        rows.append(_compare(ours, theirs, answer))
        progress()
    positions = sum(row.positions for row in rows)
    differences = [paired("log-likelihood of the other's answers, nats a token", [
        (row.other_nll - row.nll) / row.positions for row in rows
    ])]  # fmt: skip
    known = [index for index, text in enumerate(references) if text.strip()]
    if known:
        differences += _against_references(
            (engine, other), [(prompts[index], references[index]) for index in known], tokenizer, max_length
        )
    return {
        "prompts": len(prompts),
        "positions": positions,
        "greedy_agreement": sum(row.agree for row in rows) / positions,
        "kl_mean": sum(row.kl for row in rows) / positions,
        "perplexity": {
            "engine": float(np.exp(sum(row.nll for row in rows) / positions)),
            "other": float(np.exp(sum(row.other_nll for row in rows) / positions)),
        },
        "equal_outputs": sum(
            first_divergence(prompt.other_baseline[0], prompt.baseline[0]) is None for prompt in prompts
        ),
        "references": len(known),
        "paired": differences,
    }


def scores(engine: Scorer, prompt: Sequence[int], answer: Sequence[int]) -> Array:
    """Log-probabilities of every token at each place of an answer.  # [A, vocab_size]

    Args:
        engine: gives logits of a given text.
        prompt: token ids.  # [P]
        answer: token ids.  # [A]
    """
    text = [*prompt, *answer[:-1]]
    logits = np.concatenate(list(engine.score(text, chunk=CHUNK, start=len(prompt) - 1))).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))


def _compare(ours: Array, theirs: Array, answer: Sequence[int]) -> Compared:
    places = np.arange(len(answer)), np.asarray(answer)
    return Compared(
        len(answer),
        int((ours.argmax(-1) == theirs.argmax(-1)).sum()),
        float((np.exp(theirs) * (theirs - ours)).sum()),
        float(-ours[places].sum()),
        float(-theirs[places].sum()),
    )


def _against_references(
    engines: tuple[Scorer, Scorer], pairs: Sequence[tuple[PromptResult, str]], tokenizer: Any, max_length: int
) -> list[dict[str, Any]]:
    """Both engines by what people answered: its likelihood under each, and how much of it their own answers share."""
    likelihood, overlap = [], []
    for prompt, reference in pairs:
        answer = token_ids(tokenizer, reference)
        answer = answer[: max_length - len(prompt.input_ids)]
        places = np.arange(len(answer)), np.asarray(answer)
        ours, theirs = (scores(each, prompt.input_ids, answer)[places].mean() for each in engines)
        likelihood.append(float(ours - theirs))
        texts = (
            tokenizer.decode(runs[0].tokens, skip_special_tokens=True)
            for runs in (prompt.baseline, prompt.other_baseline)
        )
        ours_f1, theirs_f1 = (word_f1(text, reference) for text in texts)
        overlap.append(ours_f1 - theirs_f1)
    return [
        paired("log-likelihood of people's answers, nats a token", likelihood),
        paired("words shared with people's answers, F1", overlap),
    ]


def word_f1(text: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, counted (as in SQuAD, arXiv 1606.05250).  # 0 .. 1"""
    ours, theirs = (Counter(WORD.findall(each.lower())) for each in (text, reference))
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total()) if shared else 0.0


def paired(name: str, differences: Sequence[float]) -> dict[str, Any]:
    """Mean difference a prompt, with its 95 % interval, and what would have been seen at 80 % power.

    Args:
        name: of what differs, with its unit.
        differences: this engine or mode less the other, by prompt.
    """
    values = np.asarray(differences)
    mean = float(values.mean())
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("inf")
    half = NORMAL_95 * error
    return {
        "measure": name,
        "prompts": len(values),
        "difference": mean,
        "ci95": [mean - half, mean + half] if len(values) > 1 else None,
        "detectable": (NORMAL_95 + NORMAL_POWER_80) * error if len(values) > 1 else None,
        "differs": bool(abs(mean) > half),
    }
