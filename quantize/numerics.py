"""The arithmetic of the weight formats on float32 rows: scales from the weights themselves, codes, and their packing.

Every function works row by row, so a matrix can be quantized in chunks of rows.

Sources: TensorRT-LLM's ``preprocess_perlayer_weights`` (what the loader takes) and the OCP MX specification (float4_e2m1fn).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from medusa_export.quantize.formats import FP4_MAX, FP8_MAX, INT4_MAX, INT8_MAX

MIN_BLOCK_SCALE = 2.0**-9  # the smallest float8_e4m3fn above zero
FP4_EDGES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # midpoints of 0, 0.5, 1, 1.5, 2, 3, 4, 6


def row_scales(weight: torch.Tensor, bound: float) -> torch.Tensor:
    """The scale of every row; 1 for rows of zeros.  # float32 [out, in] -> [out]"""
    return _filled(weight.abs().amax(dim=1) / bound)


def group_scales(weight: torch.Tensor, group_size: int, bound: float = INT4_MAX) -> torch.Tensor:
    """The scale of every group of inputs; 1 for groups of zeros.  # float32 [out, in] -> [out, in / group_size]

    Args:
        weight: rows of a matrix.  # float32 [out, in]
        group_size: inputs that share a scale; divides ``in``.
        bound: largest code.
    """
    return _filled(_grouped(weight, group_size).abs().amax(dim=-1) / bound)


def int8_rows(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Symmetric INT8.  # float32 [out, in], a scale a row [out] -> int8 [out, in]"""
    codes = (weight / scales[:, None]).round_()
    return codes.clamp_(-INT8_MAX - 1, INT8_MAX).to(torch.int8)


def int4_groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Symmetric INT4 codes, -8 .. 7, with a scale a group.  # float32 [out, in] -> int8 [out, in]"""
    codes = (_grouped(weight, group_size) / group_scales(weight, group_size)[..., None]).round_()
    return codes.clamp_(-INT4_MAX - 1, INT4_MAX).to(torch.int8).reshape(weight.shape)


def pack_rows(codes: torch.Tensor) -> torch.Tensor:
    """Two rows of 4-bit codes in one of bytes, the first in the low half.  # int8 [out, in] -> [out / 2, in]"""
    return (codes[0::2] & 0x0F) | (codes[1::2] << 4)


def fp4_block_scales(weight: torch.Tensor, global_scale: float, block_size: int) -> torch.Tensor:
    """NVFP4's scale of every block, itself in units of ``global_scale``.

    Args:
        weight: rows of a matrix.  # float32 [out, in]
        global_scale: float32 value above 0, one for the whole matrix.
        block_size: inputs that share a scale; divides ``in``.

    Returns:
        float8_e4m3fn.  # [out, in / block_size]
    """
    scales = _grouped(weight, block_size).abs().amax(dim=-1) / (FP4_MAX * global_scale)
    return _filled(scales).clamp_(MIN_BLOCK_SCALE, FP8_MAX).to(torch.float8_e4m3fn)


def fp4_blocks(weight: torch.Tensor, global_scale: float, block_size: int) -> torch.Tensor:
    """NVFP4 codes, two neighbouring inputs a byte, the first in the low half.

    Ties go to the even mantissa, as in IEEE rounding.

    Args:
        weight: rows of a matrix.  # float32 [out, in]
        global_scale: float32 value above 0, one for the whole matrix.
        block_size: inputs that share a scale; divides ``in``.

    Returns:
        uint8.  # [out, in / 2]
    """
    scale = fp4_block_scales(weight, global_scale, block_size).to(torch.float32) * global_scale
    scaled = (_grouped(weight, block_size) / scale[..., None]).reshape(weight.shape)
    magnitude, edges = scaled.abs(), torch.tensor(FP4_EDGES)
    codes = torch.bucketize(magnitude, edges, out_int32=True)  # a tie stays below its edge ...
    for edge in FP4_EDGES[1::2]:
        codes += magnitude == edge  # ... which is right where the code below is even
    codes = codes.to(torch.uint8) | ((scaled < 0).to(torch.uint8) << 3)
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def _grouped(weight: torch.Tensor, size: int) -> torch.Tensor:
    return weight.reshape(weight.shape[0], -1, size)


def _filled(scales: torch.Tensor) -> torch.Tensor:
    """Zeros have no scale; 1 stores them as zeros and cannot divide by zero."""
    return torch.where(scales == 0, 1.0, scales)


def fp8_scale(amax: float) -> float:
    """The FP8 scale of a tensor whose largest magnitude is ``amax``, rounded to the float32 that files hold."""
    return code_scale(amax, FP8_MAX)


def code_scale(amax: float, bound: float) -> float:
    """What one unit of a code is worth when ``bound`` is the code of ``amax``; in the float32 that files hold."""
    return float(np.float32(amax) / np.float32(bound))


def fused_amax(amax: Mapping[str, float], modules: Iterable[str]) -> float:
    """The largest magnitude of linears that are stored as one tensor (q, k and v), or that the builder fuses."""
    return max(amax[name] for name in modules)


def fused_scale(amax: Mapping[str, float], modules: Iterable[str]) -> float:
    """One FP8 scale for fused linears."""
    return fp8_scale(fused_amax(amax, modules))


def quantize_fp8(weight: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """``weight / scale`` in float8_e4m3fn; computed in float32 and saturating on every torch release.

    Args:
        weight: any floating dtype.  # [out, in]
        scale: float32 value above 0, or one a row.  # [out, 1]

    Returns:
        float8_e4m3fn.  # [out, in]
    """
    scaled = weight.to(torch.float32) / scale
    return scaled.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def dequantize_fp8(weight: torch.Tensor, scale: float) -> torch.Tensor:
    """The float32 weight that a stored FP8 weight stands for.  # [out, in]"""
    return weight.to(torch.float32) * scale
