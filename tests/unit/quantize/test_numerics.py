"""Codes and packing, against the definitions of the formats and against ModelOpt's own packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_export.quantize import numerics

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def random(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_int8_rows_by_hand() -> None:
    weight = torch.tensor([[127.0, -63.5, 0.4, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, -1.0, 0.5, 0.25]])
    scales = numerics.row_scales(weight, 127.0)
    assert scales.tolist() == [1.0, 1.0, pytest.approx(1 / 127)]
    assert numerics.int8_rows(weight, scales).tolist() == [[127, -64, 0, 0], [0] * 4, [127, -127, 64, 32]]


def test_int4_packs_two_rows_the_first_in_the_low_half() -> None:
    assert numerics.pack_rows(torch.tensor([[1, -1], [2, -8]], dtype=torch.int8)).tolist() == [[0x21, 0x8F - 256]]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 100), st.sampled_from([2, 6]), st.sampled_from([64, 128]))
def test_int4_is_modelopts(seed: int, rows: int, group: int) -> None:
    from modelopt.torch.export.quant_utils import get_scaling_factor_from_weight, pack_int4_in_uint8

    weight = random(rows, 256, seed)
    scales = numerics.group_scales(weight, group)
    assert torch.equal(scales, get_scaling_factor_from_weight(weight, group))
    packed = numerics.pack_rows(numerics.int4_groups(weight, group))
    assert torch.equal(packed.view(torch.uint8), pack_int4_in_uint8(weight, scales, group))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 100), st.sampled_from([1, 5]))
def test_fp4_is_modelopts(seed: int, rows: int) -> None:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    weight = random(rows, 64, seed)
    weight[0, :16] = 0
    scale = float(weight.abs().max() / (6 * 448))
    quantized, blocks, _ = NVFP4QTensor.quantize(weight.clone(), 16, None, torch.tensor(scale))
    assert torch.equal(numerics.fp4_block_scales(weight, scale, 16).view(torch.uint8), blocks.view(torch.uint8))
    assert torch.equal(numerics.fp4_blocks(weight, scale, 16), quantized._quantized_data)


def test_fp4_rounds_to_the_nearest_value_and_ties_to_even() -> None:
    scale = 1 / 448  # a block whose largest value is 6 then has the scale 448 / 448
    edges = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    weight = torch.cat([edges, -edges, torch.tensor([6.0, 0.26])])[None]
    packed = numerics.fp4_blocks(weight, scale, 16)
    found = torch.stack([packed & 0xF, packed >> 4], dim=2).reshape(-1)
    values = [FP4[code & 7] * (-1 if code >= 8 else 1) for code in found.tolist()]
    ties = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert values == [*ties, *(-value for value in ties), 6.0, 0.5]


def test_a_block_of_tiny_weights_has_the_smallest_scale() -> None:
    """Its scale would round to 0, and its weights be divided by that."""
    weight = torch.cat([torch.full((1, 16), 1e-6), torch.full((1, 16), 6.0)], dim=1)
    scale = 1 / 448
    assert numerics.fp4_block_scales(weight, scale, 16).float().tolist() == [[2.0**-9, 448.0]]
    packed = numerics.fp4_blocks(weight, scale, 16)
    assert packed.tolist() == [[0x00] * 8 + [0x77] * 8]


def test_int8_saturates() -> None:
    weight, scales = torch.tensor([[300.0, -300.0, 63.4, -64.0]]), torch.tensor([0.5])
    assert numerics.int8_rows(weight, scales).tolist() == [[127, -128, 127, -128]]


def test_int4_groups_by_hand() -> None:
    weight = torch.tensor([[7.0, -3.5, 0.0, 1.0], [0.0, 0.0, -14.0, 6.0]])
    assert numerics.group_scales(weight, 2).tolist() == [[1.0, pytest.approx(1 / 7)], [1.0, 2.0]]
    assert numerics.group_scales(weight, 4, bound=1.0).tolist() == [[7.0], [14.0]]
    assert numerics.int4_groups(weight, 2).tolist() == [[7, -4, 0, 7], [0, 0, -7, 3]]


def test_fp8_by_hand() -> None:
    """17 lies between 16 and 18, which are neighbours in float8_e4m3fn: the tie goes to the even one."""
    weight = torch.tensor([[34.0, -1.0, 2000.0], [0.5, -2000.0, 0.0]], dtype=torch.bfloat16)
    assert numerics.quantize_fp8(weight, 2.0).dtype == torch.float8_e4m3fn
    assert numerics.quantize_fp8(weight, 2.0).float().tolist() == [[16.0, -0.5, 448.0], [0.25, -448.0, 0.0]]
    rows = torch.tensor([[2.0], [0.25]])
    assert numerics.quantize_fp8(weight, rows).float().tolist() == [[16.0, -0.5, 448.0], [2.0, -448.0, 0.0]]
    assert numerics.dequantize_fp8(numerics.quantize_fp8(weight, 2.0), 2.0).tolist() == [[32, -1, 896], [0.5, -896, 0]]


def test_scales_are_the_largest_magnitude_over_the_bound() -> None:
    assert numerics.fp8_scale(896.0) == 2.0
    assert numerics.code_scale(1.0, 3.0) == float(torch.tensor(1.0) / 3)  # in float32
    assert numerics.code_scale(1.0, 3.0) != 1 / 3
    amax = {"q": 448.0, "k": 896.0, "other": 4480.0}
    assert (numerics.fused_amax(amax, ["q", "k"]), numerics.fused_scale(amax, ["q", "k"])) == (896.0, 2.0)
