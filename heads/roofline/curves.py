"""``cost.json`` from a roofline: the file that medusa-tree cost writes, marked as estimated, with everything that it rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from medusa_export.heads.roofline.step import DEFAULTS, RANGES, Assumptions, Deployment, Number, corners, step_ms

SIZES = (*range(1, 17), *range(20, 65, 4))  # nodes; between them the search takes costs as linear
BATCHES = (1, 2, 4, 8, 16, 32, 64)
PAST_LENGTHS = (256, 1024, 4096, 8192, 16384, 32768)
LOOKUP = "prompt lookup"
LOOKUP_DRAFTS = 10  # tokens that prompt lookup proposes, as its authors set it


def estimate_curve(
    deployment: Deployment, *, batch: int, past_length: int, plain: Mapping[str, Deployment] | None = None,
    assumptions: Assumptions = DEFAULTS, sizes: Sequence[int] = SIZES,
) -> dict[str, Any]:  # fmt: skip
    """A curve as medusa-tree measures one: milliseconds of verifying nodes and of drafting, and what they may be off by.

    All heads run on all rows whatever the tree's depth, as in TensorRT-LLM: ``draft`` is the same for every depth, and what more
    rows cost the heads is in ``verify``. ``step_ratio_range`` is of the whole step over one without a tree, over the corners
    of the assumptions; numerator and denominator share their assumptions.

    Args:
        plain: name -> the same model in another format, decoded without heads.
        sizes: numbers of nodes; 1 is always among them.
    """
    every = corners(assumptions)

    def times(nodes: int, medusa: bool) -> Number:
        return step_ms(deployment, batch, nodes, past_length, medusa=medusa, assumptions=every)

    base = times(1, False)
    draft = times(1, True) - base
    verify = [_row("nodes", 1, base)]
    for nodes in sorted(set(sizes) - {1}):
        whole = times(nodes, True)
        verify.append(_row("nodes", nodes, whole - draft) | {"step_ratio_range": _range(whole / base)})
    return {
        "batch": batch,
        "past_length": past_length,
        "estimated": deployment.gpu.name,
        "verify": verify,
        "draft": [_row("depth", depth, draft) for depth in range(1, deployment.shape.heads + 1)],
        "alternatives": [
            *(
                _row("name", name, step_ms(other, batch, 1, past_length, assumptions=every))
                for name, other in (plain or {}).items()
            ),
            _row("name", LOOKUP, times(1 + LOOKUP_DRAFTS, False)) | {"nodes": 1 + LOOKUP_DRAFTS},
        ],
    }


def estimate_costs(
    deployment: Deployment, *, batches: Sequence[int], past_lengths: Sequence[int],
    plain: Mapping[str, Deployment] | None = None, assumptions: Assumptions = DEFAULTS,
) -> dict[str, Any]:  # fmt: skip
    """The body of ``cost.json``: a curve of every batch and length that the GPUs' memory holds, and all inputs.

    Args:
        plain: see :func:`estimate_curve`; those that do not fit are left out.
    """
    curves, left_out = [], []
    for batch in batches:
        for past in past_lengths:
            if not fits(deployment, batch, past):
                left_out.append({"batch": batch, "past_length": past, "reason": "more than the GPU's memory"})
                continue
            others = {name: other for name, other in (plain or {}).items() if fits(other, batch, past)}
            curve = estimate_curve(deployment, batch=batch, past_length=past, plain=others, assumptions=assumptions)
            curves.append(curve)
    return {
        "estimated": estimated_of(deployment, assumptions),
        "backend": "roofline",
        "curves": curves,
        "left_out": left_out,
    }


def fits(deployment: Deployment, batch: int, past: int) -> bool:
    """Whether weights and cache are within a GPU's memory; activations are not counted.

    Args:
        deployment: model, formats and GPU.
        batch: sequences at once.
        past: tokens in the cache of each.
    """
    return deployment.needed_bytes(batch, past, max(SIZES)) <= deployment.gpu.memory


def estimated_of(deployment: Deployment, assumptions: Assumptions) -> dict[str, Any]:
    """Everything that an estimate rests on, for its file."""
    return {
        "gpu": asdict(deployment.gpu),
        "tp": deployment.tp,
        "model": asdict(deployment.shape),
        "weights": asdict(deployment.weights),
        "heads": asdict(deployment.heads),
        "kv_bits": deployment.kv_bits,
        "assumptions": asdict(assumptions),
        "ranges": {name: list(ends) for name, ends in RANGES.items()},
    }


def _row(name: str, value: object, times: Number) -> dict[str, Any]:
    return {name: value, "ms": round(float(np.ravel(times)[0]), 4), "range": _range(times)}


def _range(values: Number) -> list[float]:
    return [round(float(np.min(values)), 4), round(float(np.max(values)), 4)]
