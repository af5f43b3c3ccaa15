"""One tensor of a checkpoint that is to be written: its name, source, slice, kind, dtype and shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "int8": 1, "uint8": 1}


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
class Slice:
    """Rows ``start .. stop - 1`` of a checkpoint tensor, all of them by default."""

    tensor: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of one rank file.

    Attributes:
        name: in the TensorRT-LLM checkpoint.
        kind: how it is made.
        dtype: torch's name.
        shape: on this rank.
        sources: stacked on axis 0; zero rows fill up what they leave of ``shape``.
        columns: of the sources, ``(start, stop)``; None is all.
        modules: the Hugging Face modules that share this tensor's scales.
        layer: whose key/value scale it is; read for that kind only.
    """

    name: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[Slice, ...] = ()
    columns: tuple[int, int] | None = None
    modules: tuple[str, ...] = ()
    layer: int = 0

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * BYTES[self.dtype]
