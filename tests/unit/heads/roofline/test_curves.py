"""cost.json of an estimate: what the search makes of it is the model's own ratio, and all inputs are in the file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from medusa_export.heads.roofline.curves import BATCHES, LOOKUP, PAST_LENGTHS, estimate_costs, estimate_curve
from medusa_export.heads.roofline.gpus import BY_KEY
from medusa_export.heads.roofline.shape import ModelShape, Precision
from medusa_export.heads.roofline.step import DEFAULTS, Assumptions, Deployment, step_ms
from medusa_export.heads.trees.step_costs import cost_curve, load_costs, select

SHAPE = ModelShape(32, 4096, 14336, 32, 8, 128, 128256, 4, 1)
H100 = Deployment(SHAPE, BY_KEY["h100"])
PLAIN = {"fp8 without Medusa": replace(H100, shape=replace(SHAPE, heads=0), weights=Precision(8, "fp8"))}


@pytest.mark.parametrize("nodes", [2, 7, 16, 64])
@pytest.mark.parametrize("batch", [1, 16])
def test_a_step_with_a_tree_is_the_models(nodes: int, batch: int) -> None:
    """Verifying and drafting stand apart in the file; together they are the step, and its range is of the whole step."""
    cost = cost_curve(estimate_curve(H100, batch=batch, past_length=1024))
    times = [float(step_ms(H100, batch, size, 1024, medusa=size > 1)) for size in (nodes, 1)]
    assert cost.ratio(nodes, 1) == cost.ratio(nodes, 4) == pytest.approx(times[0] / times[1], rel=1e-3)
    low, high = cost.ratio_range(nodes) or pytest.fail("an estimate has a range")
    assert low <= cost.ratio(nodes, 2) <= high
    assert low < high
    assert cost.estimated == "H100-80GB"
    assert cost.ratio_range(1) is None


def test_other_ways_of_decoding() -> None:
    curve = estimate_curve(H100, batch=2, past_length=1024, plain=PLAIN)
    found = {row["name"]: row for row in curve["alternatives"]}
    assert found["fp8 without Medusa"]["ms"] == pytest.approx(
        float(step_ms(PLAIN["fp8 without Medusa"], 2, 1, 1024)), abs=1e-4
    )
    assert found[LOOKUP]["ms"] == pytest.approx(float(step_ms(H100, 2, 11, 1024)), abs=1e-4)
    assert found[LOOKUP]["nodes"] == 11


def test_a_file(tmp_path: Path) -> None:
    body = estimate_costs(H100, batches=BATCHES, past_lengths=PAST_LENGTHS, plain=PLAIN)
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(body))
    curves = load_costs(path)
    assert curves[0]["estimated"] == "H100-80GB"
    left_out = {(row["batch"], row["past_length"]) for row in body["left_out"]}
    assert len(curves) + len(left_out) == len(BATCHES) * len(PAST_LENGTHS)
    assert (64, 32768) in left_out  # 275 GB of cache
    assert (1, 32768) not in left_out
    one, many = (cost_curve(select(curves, batch=batch, past_length=1024)).ratio(32, 1) for batch in (1, 32))
    assert one < 1.5 < many
    assert Assumptions(**body["estimated"]["assumptions"]) == DEFAULTS
    assert body["estimated"]["gpu"]["sources"]["bandwidth"].startswith("NVIDIA H100")
    assert body["estimated"]["model"]["intermediate"] == 14336
    assert set(body["estimated"]["ranges"]) == {"bandwidth", "arithmetic", "serial", "kernel_us", "collective_us"}


def test_assumptions_change_the_curve() -> None:
    slow = estimate_curve(H100, batch=1, past_length=256, assumptions=replace(DEFAULTS, bandwidth=0.4))
    fast = estimate_curve(H100, batch=1, past_length=256)
    assert slow["verify"][0]["ms"] > 1.6 * fast["verify"][0]["ms"]
    low, high = slow["verify"][0]["range"]
    assert low <= slow["verify"][0]["ms"] <= high
