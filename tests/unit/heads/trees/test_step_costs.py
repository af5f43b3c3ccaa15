"""Costs that were written by hand or elsewhere."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.heads.trees.step_costs import PRIOR_COSTS, StepCosts, cost_curve, load_costs, select


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
    with pytest.raises(ConfigError, match=r"expected what was measured: batches 1, 8; past lengths 100, 500; measure"):
        select(found, batch=4)
    with pytest.raises(ConfigError, match="got batch 1 and past length 7;"):
        select(found, past_length=7)


@pytest.mark.parametrize("backend", PRIOR_COSTS)
def test_priors_are_ratios_to_a_step_of_one_node(backend: str) -> None:
    curves = PRIOR_COSTS[backend]
    for curve in curves:
        nodes, times = zip(*((row["nodes"], row["ms"]) for row in curve["verify"]), strict=True)
        heads = [row["ms"] for row in curve["draft"]]
        assert (curve["batch"], nodes[0], times[0]) == (1, 1, 1.0)
        assert list(times) == sorted(set(times)), "more nodes cost more"
        assert heads == sorted(heads), "more heads cost more"
        assert [row["depth"] for row in curve["draft"]] == list(range(1, len(heads) + 1))
        assert 0 < heads[0] <= heads[-1] < 0.1, "heads cost a few percent of a step"
    sizes = [[row["nodes"] for row in curve["verify"]] for curve in curves]
    assert all(each == sizes[0] for each in sizes)
    pasts = [curve["past_length"] for curve in curves]
    assert pasts == sorted(set(pasts))
    for shorter, longer in itertools.pairwise(curves):
        assert all(a["ms"] <= b["ms"] for a, b in zip(shorter["verify"], longer["verify"], strict=True))


def curve(batch: int, past: int, *times: float) -> dict[str, Any]:
    rows = [{"nodes": nodes, "ms": ms} for nodes, ms in zip((1, 4, 8), times, strict=True)]
    return {"batch": batch, "past_length": past, "verify": rows, "draft": [{"depth": 1, "ms": 0.5}]}


@pytest.mark.parametrize(
    ("given", "ms"),
    [
        ({"nodes": 4, "depth": 0, "past_length": 0}, 16.0),
        ({"nodes": 4, "depth": 1, "past_length": 0}, 16.5),
        ({"nodes": 4, "depth": 3, "past_length": 0}, 17.5),  # beyond the most heads: 0.5 a head, as one of them
        ({"nodes": 2, "depth": 0, "past_length": 0}, 12.0),  # between sizes
        ({"nodes": 12, "depth": 0, "past_length": 0}, 36.0),  # beyond the most nodes: 3 a node, as 8 of them
        ({"nodes": 1, "depth": 0, "past_length": 25}, 12.5),  # between past lengths
        ({"nodes": 1, "depth": 0, "past_length": 999}, 20.0),
        ({"nodes": 4, "depth": 0, "past_length": 0, "batch": 2}, 40.0),  # the next larger batch
        ({"nodes": 4, "depth": 0, "past_length": 0, "batch": 4}, 40.0),
        ({"nodes": 4, "depth": 0, "past_length": 0, "batch": 8}, 80.0),  # as many rows as 8 nodes of 4
        ({"nodes": 1, "depth": 0, "past_length": 0, "batch": 8}, 30.0 + 10.0 / 3),  # as 2 nodes of 4
    ],
)
def test_a_step_of_any_size(given: dict[str, Any], ms: float) -> None:
    costs = StepCosts([curve(4, 0, 30.0, 40.0, 80.0), curve(1, 100, 20.0, 26.0, 34.0), curve(1, 0, 10.0, 16.0, 24.0)])
    assert costs.ms(**given) == pytest.approx(ms)


def test_heads_without_costs() -> None:
    """Of a file that was written by hand with nodes alone."""
    costs = StepCosts([curve(1, 0, 10.0, 16.0, 24.0) | {"draft": []}])
    assert costs.ms(4, 3, 0) == 16.0


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"batch": 0}, "batch 0"), ({"batch": -1}, "batch -1"), ({"batch": 1e400}, "batch inf"), ({"batch": 10**400}, "batch 1000"),
        ({"batch": None}, "batch None"), ({"batch": True}, "batch True"), ({"past_length": -1}, "past_length -1"),
        ({"verify": [{"nodes": 1, "ms": 10}, {"nodes": 0, "ms": 1}]}, "nodes 0"),
        ({"verify": [{"nodes": 1, "ms": 10**400}]}, "a value of another kind"),
        ({"verify": [{"nodes": 1, "ms": 1e-320}]}, "1e-320 ms"), ({"verify": [{"nodes": 1, "ms": 1e300}]}, "1e+300 ms"),
        ({"verify": [{"nodes": 2, "ms": 1}]}, "sizes [2] and depths []"),
        ({"draft": [{"depth": 0, "ms": 1}]}, "depth 0"), ({"draft": [{"depth": 1.5, "ms": 1}]}, "depth 1.5"),
        ({"alternatives": [{"name": "x", "ms": 0}]}, "0 ms"), ({"alternatives": [{"name": "x", "ms": float("nan")}]}, "nan ms"),
        ({"alternatives": [{"name": "x", "ms": 1, "nodes": "y"}]}, "nodes 'y'"), ({"alternatives": [3]}, "a value of another kind"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_numbers_that_cannot_be(change: dict[str, Any], got: str, tmp_path: Path) -> None:
    curve = {"estimated": "H100", "verify": [{"nodes": 1, "ms": 10}, {"nodes": 64, "ms": 12}], **change}
    (tmp_path / "c.json").write_text(json.dumps({"curves": [curve]}))
    with pytest.raises(ConfigError) as raised:
        load_costs(tmp_path / "c.json")
    assert raised.value.where == str(tmp_path / "c.json")
    assert raised.value.got.startswith(got)


def test_estimates_keep_what_they_are_for(tmp_path: Path) -> None:
    row = {"nodes": 4, "ms": 2.0, "step_ratio_range": [1.5, 2.5]}
    body = {"estimated": "H100", "verify": [{"nodes": 1, "ms": 1.0}, row], "alternatives": [{"name": "plain", "ms": 1}]}
    (tmp_path / "c.json").write_text(json.dumps({"curves": [body]}))
    (found,) = load_costs(tmp_path / "c.json")
    assert (found["estimated"], found["alternatives"]) == ("H100", [{"name": "plain", "ms": 1.0}])
    assert cost_curve(found).estimated == "H100"
    assert cost_curve(found).ratio_range(4) == (1.5, 2.5)
    for wrong in ([2.5, 1.5], [0, 1], [1, float("inf")]):
        row["step_ratio_range"] = wrong
        (tmp_path / "c.json").write_text(json.dumps({"curves": [body]}))
        with pytest.raises(ConfigError, match="step_ratio_range"):
            load_costs(tmp_path / "c.json")
