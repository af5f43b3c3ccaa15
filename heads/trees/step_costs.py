"""``cost.json``: what steps cost, measured here by medusa-tree or on another machine by other means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medusa_export.core.errors import ConfigError
from medusa_export.core.json_fields import read_json
from medusa_export.heads.trees.search import CostCurve

COST_FILE = "cost.json"


def load_costs(path: Path) -> list[dict[str, Any]]:
    """The curves of a file, also of one that was written by hand with nodes and ms alone.

    Raises:
        ConfigError: not such a file.
    """
    curves = read_json(path).get("curves")
    try:
        if not isinstance(curves, list) or not curves:
            raise ValueError("no list of curves")
        found = [
            {
                "batch": int(curve.get("batch", 1)),
                "past_length": int(curve.get("past_length", 0)),
                "verify": [_verify_row(row) for row in curve["verify"]],
                "draft": [
                    {**row, "depth": int(row["depth"]), "ms": float(row["ms"])} for row in curve.get("draft", ())
                ],
                **_estimated(curve),
            }
            for curve in curves
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        expected = '{"curves": [{"batch": 1, "verify": [{"nodes": 1, "ms": 10.0}, ...]}]}'
        raise ConfigError(str(path), f"{type(error).__name__}: {error}", expected, "correct it") from error
    for curve in found:
        cost_curve(curve)
    return found


def _verify_row(row: Mapping[str, Any]) -> dict[str, Any]:
    found = {**row, "nodes": int(row["nodes"]), "ms": float(row["ms"])}
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
    others = [{**row, "name": str(row["name"]), "ms": float(row["ms"])} for row in curve.get("alternatives", ())]
    return {"estimated": str(curve["estimated"]), "alternatives": others}


def cost_curve(curve: Mapping[str, Any]) -> CostCurve:
    """One curve, as the search takes it."""
    verify = {row["nodes"]: row["ms"] for row in curve["verify"]}
    draft = {row["depth"]: row["ms"] for row in curve["draft"]}
    ranges = {row["nodes"]: row["step_ratio_range"] for row in curve["verify"] if "step_ratio_range" in row}
    return CostCurve(verify, draft, curve.get("estimated"), ranges)


def select(curves: list[dict[str, Any]], *, batch: int = 1, past_length: int | None = None) -> dict[str, Any]:
    """The first curve of a batch size, and of a past length if one is given.

    Raises:
        ConfigError: there is none.
    """
    found = [row for row in curves if row["batch"] == batch and past_length in (None, row["past_length"])]
    if not found:
        got = f"batch {batch}" + (f" and past length {past_length}" if past_length is not None else "")
        known = "; ".join(f"batch {row['batch']}, past length {row['past_length']}" for row in curves)
        raise ConfigError("step costs", got, f"what was measured: {known}", "measure it or choose another")
    return found[0]
