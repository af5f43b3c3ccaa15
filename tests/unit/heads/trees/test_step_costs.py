"""Costs that were written by hand or elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.heads.trees.step_costs import cost_curve, load_costs, select


def test_costs_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"curves": [{"batch": 8, "verify": [{"nodes": 1, "ms": 10}, {"nodes": 64, "ms": 12}]}]}))
    (curve,) = load_costs(path)
    assert (curve["batch"], curve["past_length"], curve["draft"]) == (8, 0, [])
    assert cost_curve(curve).ratio(64, 4) == pytest.approx(1.2)


@pytest.mark.parametrize(
    "body",
    [{}, {"curves": []}, {"curves": [3]}, {"curves": [{"verify": [{"nodes": 1}]}]}, {"curves": [{"verify": [{"nodes": 2, "ms": 1}]}]},
     {"curves": [{"verify": [{"nodes": 1, "ms": -1}]}]}],
)  # fmt: skip
def test_no_costs(body: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps(body))
    with pytest.raises(ConfigError):
        load_costs(tmp_path / "c.json")


def test_a_curve_is_selected(tmp_path: Path) -> None:
    row = [{"nodes": 1, "ms": 1}]
    curves = [{"batch": batch, "past_length": past, "verify": row} for batch in (1, 8) for past in (100, 500)]
    (tmp_path / "c.json").write_text(json.dumps({"curves": curves}))
    found = load_costs(tmp_path / "c.json")
    assert select(found) is found[0]
    assert select(found, batch=8, past_length=500) is found[3]
    with pytest.raises(ConfigError, match="batch 8, past length 500"):
        select(found, batch=4)
