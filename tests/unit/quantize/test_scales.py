from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from medusa_export.core.errors import CheckpointError
from medusa_export.quantize.formats import FP8_MAX
from medusa_export.quantize.numerics import dequantize_fp8, fp8_scale, fused_scale, quantize_fp8
from medusa_export.quantize.scales import Scales

SCALES = Scales({"a": 0.1, "b": 3.0}, {"a": 1 / 3, "b": 2.5}, {0: 7.25, 10: 1e-9}, {"a": torch.tensor([0.1, 3.0])})


def test_saved_scales_are_the_same(tmp_path: Path) -> None:
    SCALES.save(tmp_path / "scales.safetensors")
    loaded = Scales.load(tmp_path / "scales.safetensors")
    assert (loaded.input_amax, loaded.weight_amax, loaded.kv_amax) == (
        SCALES.input_amax,
        SCALES.weight_amax,
        SCALES.kv_amax,
    )
    assert loaded.pre_quant_scale.keys() == {"a"}
    assert torch.equal(loaded.pre_quant_scale["a"], SCALES.pre_quant_scale["a"])


def test_summary() -> None:
    assert SCALES.summary()["kv_amax"] == {"count": 2, "min": 1e-9, "max": 7.25}
    assert SCALES.summary()["pre_quant_scale"] == pytest.approx({"count": 1, "min": 0.1, "max": 3.0})
    assert Scales().summary() == {}


def test_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "scales.safetensors"
    with pytest.raises(CheckpointError, match=r"scales.safetensors"):
        Scales.load(path)
    save_file({"input_amax/a": torch.ones(1)}, path)  # somebody else's
    with pytest.raises(CheckpointError, match=r"no scales in it"):
        Scales.load(path)
    SCALES.save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"calibrate again"):
        Scales.load(path)


def test_smoothing_is_finite_and_above_zero() -> None:
    with pytest.raises(CheckpointError, match=r"pre_quant_scale of a"):
        Scales(pre_quant_scale={"a": torch.tensor([1.0, 0.0])})


@pytest.mark.parametrize("amax", [0.0, -1.0, math.nan, math.inf])
def test_scales_are_finite_and_above_zero(amax: float) -> None:
    with pytest.raises(CheckpointError, match=r"weight_amax of medusa_heads.0.0.linear.*train heads"):
        Scales(weight_amax={"medusa_heads.0.0.linear": amax})
    with pytest.raises(CheckpointError, match="kv_amax of 3"):
        Scales(kv_amax={3: amax})


def test_require_names_what_is_missing() -> None:
    SCALES.require({"input_amax": ["a", "b"], "kv_amax": [0, 10], "pre_quant_scale": ["a"]})
    with pytest.raises(CheckpointError, match="weight_amax of c: got none, 1 missing in all"):
        SCALES.require({"weight_amax": ["a", "c"], "kv_amax": [0]})
    with pytest.raises(CheckpointError, match="kv_amax of 1"):
        SCALES.require({"kv_amax": [0, 1]})


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
