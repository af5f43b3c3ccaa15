"""Bytes of one linear in an ONNX graph."""

from __future__ import annotations

import math

from medusa_export.quantize.format_facts import Codes


def linear_bytes(
    codes: Codes,
    shape: tuple[int, ...],
    group_size: int | None,
    *,
    smooths: bool,
    weight: int,
    number: int,
) -> tuple[int, ...]:
    """Bytes of every tensor: codes, scales, zero points, factors of the inputs.

    Args:
        codes: what is stored.
        shape: of the weight.  # [out, in]
        group_size: inputs that share a scale; None takes the first of the codes' own sizes that divides the inputs.
        smooths: there is a factor an input.
        weight: bytes of one that is not quantized.
        number: bytes of scales and factors, where the codes do not say.
    """
    rows, width = shape
    if codes.bits is None:
        return (math.prod(shape) * weight,)
    block = group_size or next((size for size in codes.blocks if width % size == 0), 1)
    scales = codes.reach.count(rows, width, block)
    sizes = (math.prod(shape) * codes.bits // 8, scales * (codes.scale_bytes or number))
    return (*sizes, scales * codes.bits // 8 * codes.zero_points, number * width * smooths)
