"""``cost.json``: what steps cost, measured here by medusa-tree or on another machine by other means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medusa_export.core.errors import ConfigError
from medusa_export.core.json_fields import odd_value, read_json, whole
from medusa_export.heads.trees.search import LEAST_MS, MOST_MS, CostCurve

COST_FILE = "cost.json"


def _prior(past_length: int, times: Mapping[int, float], heads: Sequence[float] = ()) -> dict[str, Any]:
    return {
        "batch": 1,
        "past_length": past_length,
        "verify": [{"nodes": nodes, "ms": ms} for nodes, ms in times.items()],
        "draft": [{"depth": depth, "ms": ms} for depth, ms in enumerate(heads, start=1)],
    }


_HEADS = (0.035, 0.045, 0.055, 0.065)
# Step costs before any measurement, relative to a step of one node, by backend. ONNX Runtime: SmolLM2-135M in float32 on two busy
# cores, smoothed by hand; at 256 tokens the measurement was too noisy, and the values are between those at 64 and 1000.
# TensorRT: an assumption, as no GPU was at hand: a few nodes ride along with the weights.
PRIOR_COSTS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "onnxruntime": (
        _prior(64, {1: 1.0, 2: 1.15, 4: 1.28, 6: 1.4, 8: 1.6, 12: 1.9, 16: 2.2}, _HEADS),
        _prior(256, {1: 1.0, 2: 1.16, 4: 1.29, 6: 1.43, 8: 1.62, 12: 1.92, 16: 2.3}, _HEADS),
        _prior(1000, {1: 1.0, 2: 1.37, 4: 1.49, 6: 1.65, 8: 1.89, 12: 2.15, 16: 2.56}, _HEADS),
    ),
    "tensorrt": (_prior(256, {1: 1.0, 64: 1.1}, (0.03, 0.03, 0.03, 0.03, 0.03)),),
}


def load_costs(path: Path) -> list[dict[str, Any]]:
    """The curves of a file, also of one that was written by hand with nodes and ms alone.

    Raises:
        ConfigError: no table of step costs.
    """
    expected = '{"curves": [{"batch": 1, "verify": [{"nodes": 1, "ms": 10.0}, ...]}]}'
    curves = read_json(path, expected, "measure again").get("curves")
    try:
        if not isinstance(curves, list) or not curves:
            raise ValueError("no list of curves")
        found = [
            {
                "batch": whole({"batch": 1, **curve}, "batch", least=1),
                "past_length": whole({"past_length": 0, **curve}, "past_length"),
                "verify": [_verify_row(row) for row in curve["verify"]],
                "draft": [
                    {**row, "depth": whole(row, "depth", least=1), "ms": float(row["ms"])}
                    for row in curve.get("draft", ())
                ],
                **_estimated(curve),
            }
            for curve in curves
        ]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(str(path), odd_value(error), expected, "correct it") from error
    for curve in found:
        try:
            cost_curve(curve)
        except ConfigError as error:
            raise ConfigError(str(path), error.got, error.expected, error.action) from error
    return found


def _verify_row(row: Mapping[str, Any]) -> dict[str, Any]:
    found = {**row, "nodes": whole(row, "nodes", least=1), "ms": float(row["ms"])}
    if "step_ratio_range" in row:
        low, high = map(float, row["step_ratio_range"])
        if not 0 < low <= high < math.inf:
            raise ValueError(f"step_ratio_range {low:g} .. {high:g}")
        found["step_ratio_range"] = (low, high)
    return found


def _estimated(curve: Mapping[str, Any]) -> dict[str, Any]:
    """What only curves have that were not measured: for which GPU, and what other ways of decoding would cost there."""
    if "estimated" not in curve:
        return {}
    return {"estimated": str(curve["estimated"]), "alternatives": list(map(_other, curve.get("alternatives", ())))}


def _other(row: Mapping[str, Any]) -> dict[str, Any]:
    """Another way of decoding; ``nodes`` of its steps are 1 where they are not given."""
    found = {**row, "name": str(row["name"]), "ms": float(row["ms"])}
    if not LEAST_MS <= found["ms"] <= MOST_MS:
        raise ValueError(f"{found['ms']:g} ms")
    return found | ({"nodes": whole(row, "nodes", least=1)} if "nodes" in row else {})


def cost_curve(curve: Mapping[str, Any]) -> CostCurve:
    """One curve, as the search takes it."""
    verify = {row["nodes"]: row["ms"] for row in curve["verify"]}
    draft = {row["depth"]: row["ms"] for row in curve["draft"]}
    ranges = {row["nodes"]: row["step_ratio_range"] for row in curve["verify"] if "step_ratio_range" in row}
    return CostCurve(verify, draft, curve.get("estimated"), ranges, curve["batch"], curve["past_length"])


def select(curves: list[dict[str, Any]], *, batch: int = 1, past_length: int | None = None) -> dict[str, Any]:
    """The first curve of a batch size, and of a past length if one is given.

    Args:
        curves: rows of cost.json.
        batch: sequences at once.
        past_length: tokens in the cache; None takes any.

    Raises:
        ConfigError: there is none.
    """
    found = [row for row in curves if row["batch"] == batch and past_length in (None, row["past_length"])]
    if not found:
        got = f"batch {batch}" + (f" and past length {past_length}" if past_length is not None else "")
        batches, lengths = ({row[name]: None for row in curves} for name in ("batch", "past_length"))
        known = f"batches {', '.join(map(str, batches))}; past lengths {', '.join(map(str, lengths))}"
        raise ConfigError("step costs", got, f"what was measured: {known}", "measure it or choose another")
    return found[0]


@dataclass(frozen=True)
class StepCosts:
    """Milliseconds of a step by its nodes, its heads, what is behind it and how many sequences take it.

    Attributes:
        curves: as :func:`load_costs` gives them; any batch sizes and past lengths.
    """

    curves: Sequence[Mapping[str, Any]]

    def ms(self, nodes: int, depth: int, past_length: float, batch: int = 1) -> float:
        """Of a step; between measured past lengths it is linear, outside of them that of the nearest.

        Args:
            nodes: of one sequence, the root included.
            depth: heads that draft; 0: none.
            past_length: tokens of a sequence in the cache.
            batch: sequences. Of a size that was not measured, the next larger one's curve is taken; beyond the largest, steps of as
                many rows: what weights cost is shared, and a row is a row.
        """
        sizes = {int(curve["batch"]) for curve in self.curves}
        size = min((known for known in sizes if known >= batch), default=max(sizes))
        rows = nodes * batch / size if batch > size else nodes
        measured = sorted(
            (int(curve["past_length"]), _at(curve, rows, depth)) for curve in self.curves if curve["batch"] == size
        )
        return float(np.interp(past_length, [past for past, _ in measured], [ms for _, ms in measured]))


def _at(curve: Mapping[str, Any], rows: float, depth: int) -> float:
    """Of one curve; beyond the most nodes or heads measured, every one costs what they cost on average."""
    sizes, times = zip(*sorted((row["nodes"], row["ms"]) for row in curve["verify"]), strict=True)
    beyond = max(1.0, rows / sizes[-1])
    return float(np.interp(rows, sizes, times)) * beyond + _draft_ms(curve, depth)


def _draft_ms(curve: Mapping[str, Any], depth: int) -> float:
    """Of so many heads; nothing where none was measured."""
    draft = {int(row["depth"]): float(row["ms"]) for row in curve["draft"]}
    if not draft or not depth:
        return 0.0
    known = min(depth, max(draft))
    return draft[known] * depth / known
