"""One tensor of a checkpoint that is to be written: its name, source, slice, kind, dtype and shape."""

from __future__ import annotations

import math
from dataclasses import dataclass

from medusa_export.quantize.stored_parts import Kind

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "int8": 1, "uint8": 1}


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
