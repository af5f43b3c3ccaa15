"""Tokens a second on GPUs, estimated from data sheets, and what Medusa would gain there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.job.gpu_costs import Target, prediction
from medusa_export.heads.roofline.curves import estimate_curve, fits
from medusa_export.heads.roofline.gpus import GPUS, Gpu
from medusa_export.heads.trees.acceptance import ACCEPTANCE_FILE, Acceptance
from medusa_export.heads.trees.search import Candidate, best, candidates
from medusa_export.heads.trees.step_costs import cost_curve


@dataclass(frozen=True)
class Speed:
    """Decoding on ``tp`` GPUs of one kind, as estimated.

    Attributes:
        without_medusa: tokens a second of the whole batch.
        step_ratio, step_ratio_range: a step with the layout's tree over one without; as many tokens per step it has to yield to pay.
        predicted: of the best tree, where acceptance is known: see :func:`~medusa_export.exporter.job.gpu_costs.prediction`.
        reason: why there is no estimate; empty where there is one.
    """

    gpu: str
    without_medusa: float = 0.0
    step_ratio: float = 0.0
    step_ratio_range: tuple[float, float] = (0.0, 0.0)
    predicted: dict[str, Any] | None = None
    reason: str = ""


def known_acceptance(heads: Path) -> Acceptance | None:
    """What medusa-train counted for heads on held-out answers and left beside them; None where there is no such file."""
    path = (heads if heads.is_dir() else heads.parent) / ACCEPTANCE_FILE
    return Acceptance.load(path) if path.is_file() else None


def estimate_speeds(
    target: Target, counted: Acceptance | None, *, max_draft_len: int, batch: int, context: int
) -> tuple[Speed, ...]:
    """An estimate for every GPU of the table.

    Args:
        max_draft_len: draft nodes of the tree that is to be exported.
        context: tokens of a sequence when it is complete; a step sees half of them on average.
    """
    return tuple(_speed(gpu, target, counted, max_draft_len, batch, max(1, context // 2)) for gpu in GPUS)


def _speed(gpu: Gpu, target: Target, counted: Acceptance | None, max_draft_len: int, batch: int, past: int) -> Speed:
    try:
        deployment = target.on(gpu)
    except ConfigError as error:
        return Speed(gpu.name, reason=error.expected)
    if not fits(deployment, batch, 2 * past):
        return Speed(gpu.name, reason="does not fit")
    nodes = max_draft_len + 1
    curve = estimate_curve(deployment, batch=batch, past_length=past, sizes=(*range(1, 65), nodes))
    cost = cost_curve(curve)
    predicted = prediction(_best(counted, curve, max_draft_len), counted, curve) if counted else None
    spread = cost.ratio_range(nodes) or (1.0, 1.0)
    plain = curve["verify"][0]["ms"]
    return Speed(gpu.name, round(1e3 * batch / plain, 2), round(cost.ratio(nodes, 1), 4), spread, predicted)


def _best(counted: Acceptance, curve: dict[str, Any], max_draft_len: int) -> Candidate:
    return best(candidates(counted.paths, counted.positions, cost_curve(curve), max_draft_len=max_draft_len))
