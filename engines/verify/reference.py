"""The engine against the original checkpoint in transformers: catches what is wrong in the same way with and without Medusa."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medusa_export.core.errors import CheckpointError, missing_package
from medusa_export.engines.verify.parity import Scorer


def compare_with_checkpoint(
    engine: Scorer,
    checkpoint: Path,
    texts: Sequence[tuple[list[int], list[int]]],
    *,
    parted: Sequence[tuple[list[int], list[int], list[int]]] = (),
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Teacher-forced agreement over the answers.

    Args:
        engine: the engine under test.
        checkpoint: Hugging Face directory of the unquantized model; computed in float32.
        texts: (prompt ids, answer ids); every answer token is one position.
        parted: (ids up to where two outputs part, how the one goes on, how the other does).

    Returns:
        positions; greedy_agreement (0 .. 1, equal argmax); kl_mean and kl_max (nats, reference to engine); perplexity of the answers
        under each; logit_max_abs_diff; parted: of each pair, the mean log-likelihood of the second continuation under the checkpoint
        less that of the first, nats a token.

    Raises:
        CheckpointError: the checkpoint's own logits are not finite.
    """
    try:
        import torch

        from medusa_export.heads.checkpoint.medusa_checkpoint import load_reference
    except ImportError as error:
        raise missing_package("torch", "modelopt") from error

    model = load_reference(checkpoint, torch.float32)
    rows = []
    with torch.inference_mode():
        for prompt, answer in texts:
            text, start = [*prompt, *answer[:-1]], len(prompt) - 1
            ours = torch.from_numpy(np.concatenate(list(engine.score(text, chunk=64, start=start))))  # [A, V]
            theirs = model(torch.tensor([text])).logits[0, start:].float()  # [A, V]
            _require_finite(theirs, checkpoint)
            rows.append(_compare(ours, theirs, torch.tensor(answer)))
            progress()
        differences = [
            _likelihood(model, start, second) - _likelihood(model, start, first) for start, first, second in parted
        ]
    columns = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    return {
        "parted": differences,
        "positions": len(columns["agree"]),
        "greedy_agreement": columns["agree"].float().mean().item(),
        "kl_mean": columns["kl"].mean().item(),
        "kl_max": columns["kl"].max().item(),
        "perplexity": {
            "engine": columns["nll_ours"].mean().exp().item(),
            "checkpoint": columns["nll_theirs"].mean().exp().item(),
        },
        "logit_max_abs_diff": columns["diff"].max().item(),
    }


def _likelihood(model: Any, text: list[int], answer: list[int]) -> float:
    """Mean log-likelihood of a continuation, nats a token."""
    import torch

    logits = model(torch.tensor([[*text, *answer[:-1]]])).logits[0, len(text) - 1 :].float()  # [A, V]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).mean())


def _require_finite(logits: Any, checkpoint: Path) -> None:
    if not bool(logits.isfinite().all()):
        got, action = "logits that are not finite, in float32", "check its weights: they overflow, or are damaged"
        raise CheckpointError(str(checkpoint), got, "a model that computes", action)


def _compare(ours: Any, theirs: Any, answer: Any) -> dict[str, Any]:
    """Per position: agreement, KL(reference || engine), negative log-likelihoods.  # each [A]"""
    log_ours, log_theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    return {
        "agree": ours.argmax(-1) == theirs.argmax(-1),
        "kl": (log_theirs.exp() * (log_theirs - log_ours)).sum(-1),
        "nll_ours": -log_ours.gather(1, answer[:, None])[:, 0],
        "nll_theirs": -log_theirs.gather(1, answer[:, None])[:, 0],
        "diff": (ours - theirs).abs().amax(-1),
    }
