"""Stored numbers and rounded activations, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from medusa_export.exporter.verify.dequantize import StoredLinear, rounded_inputs
from medusa_export.heads.checkpoint.tensor_source import TensorSource


def linear(path: Path, algo: str, **tensors: torch.Tensor) -> StoredLinear:
    save_file({f"x.{name}": tensor for name, tensor in tensors.items()}, path / "model.safetensors")
    return StoredLinear(TensorSource.open(path), "x", algo)


def test_int4(tmp_path: Path) -> None:
    packed = torch.tensor([[0x21, -1]], dtype=torch.int8)  # rows 0 and 1: low and high halves
    scales = torch.tensor([[0.5], [2.0]])
    stored = linear(
        tmp_path, "W4A16_AWQ", weight=packed, weights_scaling_factor=scales,
        prequant_scaling_factor=torch.tensor([1.0, 4.0], dtype=torch.float16),
    )  # fmt: skip
    assert stored.shape == (2, 2)
    rows = stored.rows(0, 2)
    assert rows.values.tolist() == [[0.5, -2.0], [4.0, -8.0]]
    assert rows.absolute is not None
    half_ulp = torch.finfo(torch.float16).eps / 2  # of the smoothing factor
    assert rows.absolute[1].tolist() == [1.0 * (1 + half_ulp), 4.0 * (1 + half_ulp)]  # half a step, unsmoothed
    assert rows.relative == half_ulp


def test_fp4(tmp_path: Path) -> None:
    packed = torch.full((1, 8), 0x10, dtype=torch.uint8)  # columns 2k: 0, 2k + 1: 0.5
    packed[0, 0] = 0xF7  # 6 and -6
    stored = linear(
        tmp_path, "NVFP4", weight=packed, weights_scaling_factor=torch.tensor([[2.0]]).to(torch.float8_e4m3fn),
        weights_scaling_factor_2=torch.tensor([3.0]),
    )  # fmt: skip
    assert stored.shape == (1, 16)
    assert stored.rows(0, 1).values[0, :4].tolist() == [36.0, -36.0, 0.0, 3.0]


def test_every_fp8_code(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(16, 16)
    stored = linear(tmp_path, "FP8", weight=codes, weights_scaling_factor=torch.tensor([2.0]))
    assert torch.allclose(stored.rows(3, 9).values, codes[3:9].float() * 2, rtol=0, atol=0, equal_nan=True)


def test_16_bit_is_left_alone(tmp_path: Path) -> None:
    weight = torch.randn(4, 4).to(torch.bfloat16)
    stored = linear(tmp_path, "FP8", weight=weight)
    rows = stored.rows(1, 3)
    assert torch.equal(rows.values, weight[1:3])
    assert rows.absolute is None


class TestRoundedInputs:
    def test_formats_without_rounding(self) -> None:
        x = torch.randn(3, 16)
        for algo in (None, "W8A16", "W4A16", "W4A16_AWQ"):
            assert torch.equal(rounded_inputs(algo, x, None, None), x)

    def test_int8(self) -> None:
        x = torch.tensor([[0.6, -200.0]])
        assert rounded_inputs("W8A8_SQ_PER_CHANNEL", x, 1.0, None).tolist() == [[1.0, -128.0]]
        smoothed = rounded_inputs("W8A8_SQ_PER_CHANNEL", x, 1.0, torch.tensor([2.0, 0.5]))
        assert smoothed.tolist() == [[0.5, -200.0]]

    def test_a_scale_a_token(self) -> None:
        x = torch.tensor([[448.0, 1.0], [448e-6, 1e-6]])
        assert torch.allclose(rounded_inputs("FP8_PER_CHANNEL_PER_TOKEN", x, None, None), x, rtol=1e-5)

    def test_fp4(self) -> None:
        x = torch.zeros(1, 32)
        x[0, 0], x[0, 1], x[0, 16] = 6.0, 2.4, 0.6  # a block does not pay for another one's outliers
        found = rounded_inputs("NVFP4", x, 6 / (6 * 448), None)
        assert found[0, 0].item() == pytest.approx(6.0)
        assert found[0, 1].item() == pytest.approx(2.0)
        assert found[0, 16].item() == pytest.approx(0.6, rel=0.07)
