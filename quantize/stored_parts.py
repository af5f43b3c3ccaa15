"""The tensors that a quantized linear is stored in: how each comes about, its dtype and its shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """How a tensor's bytes come about. All but the single numbers are made row by row from the rows of ``sources``."""

    COPY = "slices, cast to the plan's dtype"
    FP8 = "slices / the modules' weight scale, in float8_e4m3fn"
    FP8_ROW = "slices / the scale of each row, in float8_e4m3fn"
    INT8_ROW = "slices / the scale of each row, rounded to int8"
    INT4 = "slices / the scale of each group, rounded to 4 bits, two rows a byte"
    FP4 = "slices / the scale of each block, rounded to float4_e2m1fn, two columns a byte"
    ROW_SCALE = "largest weight of each row / the format's bound"
    GROUP_SCALE = "largest weight of each group / the format's bound"
    BLOCK_SCALE = "scale of each block in units of the weight scale, in float8_e4m3fn"
    SMOOTHING = "factor that each input is multiplied with"
    WEIGHT_SCALE = "largest weight of the modules / the bound"
    INPUT_SCALE = "largest input of the modules / the format's bound"
    KV_SCALE = "largest key or value of the layer / the cache's bound"


@dataclass(frozen=True)
class Part:
    """One of the tensors that a quantized linear is stored in.

    Attributes:
        suffix: of its name, after the module's.
        kind: how it is made.
        dtype: torch's name; None is that of unquantized tensors.
        shape: from (out, in, group size) on a rank.
    """

    suffix: str
    kind: Kind
    dtype: str | None
    shape: Callable[[int, int, int], tuple[int, ...]]


def matrix(out: int, width: int, group: int) -> tuple[int, ...]:
    """As :attr:`Part.shape`: one code a weight."""
    return out, width


def packed_rows(out: int, width: int, group: int) -> tuple[int, ...]:
    """As :attr:`Part.shape`: two rows of 4-bit codes in one."""
    return out // 2, width


def packed_columns(out: int, width: int, group: int) -> tuple[int, ...]:
    """As :attr:`Part.shape`: two columns of 4-bit codes in one."""
    return out, width // 2


def by_group(out: int, width: int, group: int) -> tuple[int, ...]:
    """As :attr:`Part.shape`: one number a group of inputs."""
    return out, width // group


def by_output(out: int, width: int, group: int) -> tuple[int, ...]:
    """As :attr:`Part.shape`: one number an output."""
    return (out,)


def by_input(out: int, width: int, group: int) -> tuple[int, ...]:
    """As :attr:`Part.shape`: one number an input."""
    return (width,)


def one(out: int, width: int, group: int) -> tuple[int, ...]:
    """As :attr:`Part.shape`: a single number, as TensorRT-LLM stores it."""
    return (1,)


def scalar(out: int, width: int, group: int) -> tuple[int, ...]:
    """As :attr:`Part.shape`: a single number, as Hugging Face stores it."""
    return ()
