from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medusa_export.heads.errors import CheckpointError, ConfigError
from medusa_export.quantize.scales import (
    FP8_MAX,
    Scales,
    dequantize_fp8,
    fp8_scale,
    fused_scale,
    kv_scale,
    quantize_fp8,
)

SCALES = Scales({"a": 0.1, "b": 3.0}, {"a": 1 / 3, "b": 2.5}, {0: 7.25, 10: 1e-9})


def test_saved_scales_are_the_same(tmp_path: Path) -> None:
    SCALES.save(tmp_path / "scales.json")
    assert Scales.load(tmp_path / "scales.json") == SCALES


@pytest.mark.parametrize("text", ["{}", '{"input_amax": 3, "weight_amax": {}, "kv_amax": {}}', "[]", "{"])
def test_damaged_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "scales.json"
    path.write_text(text)
    with pytest.raises((CheckpointError, ConfigError), match=r"scales.json"):
        Scales.load(path)


@pytest.mark.parametrize("amax", [0.0, -1.0, math.nan, math.inf])
def test_scales_are_finite_and_above_zero(amax: float) -> None:
    with pytest.raises(CheckpointError, match=r"weight amax of medusa_heads.0.0.linear.*train heads"):
        Scales(weight_amax={"medusa_heads.0.0.linear": amax})
    with pytest.raises(CheckpointError, match="kv amax of 3"):
        Scales(kv_amax={3: amax})


def test_require_names_what_is_missing() -> None:
    SCALES.require(["a", "b"], [0, 10])
    with pytest.raises(CheckpointError, match="scales of c: got 1 missing"):
        SCALES.require(["a", "c"], [0])
    with pytest.raises(CheckpointError, match="scales of layer 1 kv"):
        SCALES.require(["a"], [0, 1])


def test_cache_scale_is_never_below_one() -> None:
    assert kv_scale(10.0) == 1.0
    assert kv_scale(896.0) == 2.0


def test_fused_scale_is_the_largest() -> None:
    assert fused_scale({"q": 448.0, "k": 896.0, "v": 1.0}, ["q", "k", "v"]) == 2.0


def test_fp8_saturates_instead_of_overflowing() -> None:
    assert quantize_fp8(torch.tensor([1000.0, -1000.0]), 1.0).float().tolist() == [FP8_MAX, -FP8_MAX]


@given(st.lists(st.floats(-1e4, 1e4, width=16), min_size=1, max_size=64), st.sampled_from(["float16", "float32"]))
def test_fp8_round_trip_is_within_half_a_step(values: list[float], dtype: str) -> None:
    weight = torch.tensor(values, dtype=getattr(torch, dtype))
    amax = float(weight.abs().max())
    if amax == 0:
        return
    scale = fp8_scale(amax)
    error = (dequantize_fp8(quantize_fp8(weight, scale), scale) - weight.float()).abs()
    # 3 bits of mantissa: half a step is 1/16 of the value, or 2**-10 scales among the subnormals
    assert (error <= 1.001 * (weight.float().abs() / 16 + scale * 2.0**-10)).all()


def test_scale_is_a_float32() -> None:
    scale = fp8_scale(1 / 3)
    assert torch.tensor(scale, dtype=torch.float32).item() == scale
