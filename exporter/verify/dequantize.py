"""What the numbers of a TensorRT-LLM checkpoint stand for: every quantized form as float32 rows, with its rounding error.

Written from TensorRT-LLM's rules (``preprocess_perlayer_weights``) and the names in the file; shares no code with the writer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from medusa_export.heads.checkpoint.tensor_source import TensorSource

# float8_e4m3fn and float16: 4 and 5 bits of exponent, biases of 7 and 15; one has NaN where the other has a number
FP8_IN_FLOAT16, FP8_EXPONENT, FP8_NAN = 0xBFFF - 0x10000, 2.0 ** (15 - 7), 0x7F
FP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
# float8_e4m3fn keeps 3 bits of mantissa: half a step is 1/16 of the value, or 2**-10 scales among the subnormals.
FP8_RELATIVE, FP8_ABSOLUTE = 1 / 16, 2.0**-10
# float4_e2m1fn: half a step is at most a quarter of the value (2 for 2.5, 4 for 5), or of the scale near zero; the scale
# itself is rounded to FP8, which cuts off up to 1/16 of the largest values.
FP4_RELATIVE, FP4_ABSOLUTE = 1 / 4, 1 / 4


@dataclass(frozen=True)
class BoundedRows:
    """Some rows of a linear.

    Attributes:
        values: float32 where it was quantized, otherwise as stored.  # [n, in]
        relative, absolute: rounding may have moved them from the source by ``relative * |values| + absolute``; None where nothing
            was rounded.  # absolute: [n or 1, in or 1]
    """

    values: torch.Tensor
    relative: float = 0.0
    absolute: torch.Tensor | None = None


@dataclass(frozen=True)
class StoredVector:
    """A norm or bias on one rank, under its name in the file."""

    file: TensorSource
    name: str

    is_quantized = False

    @property
    def tensors(self) -> list[str]:
        """The names in the file that it is read from."""
        return [self.name]

    @property
    def shape(self) -> tuple[int, ...]:
        """[n]."""
        return self.file.shape(self.name)

    def rows(self, start: int, stop: int) -> BoundedRows:
        """Values ``start .. stop - 1``.  # [stop - start]"""
        return BoundedRows(self.file.read_rows(self.name, start, stop))


CODE_DTYPES = ("float8_e4m3fn", "int8", "uint8")  # what a quantized weight is stored in


@dataclass(frozen=True)
class StoredLinear:
    """A linear's weight on one rank.

    Attributes:
        module: its name in the file, without ".weight".
        algo: ``quantization.quant_algo``.
    """

    file: TensorSource
    module: str
    algo: str | None

    @property
    def is_quantized(self) -> bool:
        """Whether it is stored in other than 16 bit."""
        return self.file.dtype(f"{self.module}.weight") in CODE_DTYPES

    @property
    def tensors(self) -> list[str]:
        """The names in the file that it is read from: its weight and what belongs to it."""
        return [name for name in self.file.names if name.startswith(f"{self.module}.") and not name.endswith(".bias")]

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] on this rank, whatever the packing."""
        rows, columns = self.file.shape(f"{self.module}.weight")
        if not self.is_quantized:
            return rows, columns
        decoder = DECODERS[str(self.algo)]
        return rows * decoder.packed_rows, columns * decoder.packed_columns

    def rows(self, start: int, stop: int) -> BoundedRows:
        """Rows ``start .. stop - 1``.  # [stop - start, in]"""
        if not self.is_quantized:
            return BoundedRows(self.file.read_rows(f"{self.module}.weight", start, stop))
        return DECODERS[str(self.algo)].rows(self, start, stop)

    def number(self, kind: str) -> float:
        """A scale a tensor: "weights_scaling_factor", "activation_scaling_factor" ..."""
        return float(self.file.read_rows(f"{self.module}.{kind}", 0, 1).item())

    def _take(self, kind: str, start: int, stop: int) -> torch.Tensor:
        return _to_float(self.file.read_rows(f"{self.module}.{kind}", start, stop))

    def _unsmoothed(self, values: torch.Tensor, step: torch.Tensor) -> BoundedRows:
        """The file's weight is the source's divided by the factor of each input, before or after that was rounded to 16 bit.

        Of a factor f, stored as F = f (1 +- u), and codes half a step off: ``|F q s - w| <= u |F q s| + F (1 + u) s / 2``.
        """
        name = f"{self.module}.prequant_scaling_factor"
        stored = self.file.read_rows(name, 0, self.file.shape(name)[0])
        factor = stored.to(torch.float32)
        values = values.mul_(factor)
        half_ulp = torch.finfo(stored.dtype).eps / 2
        return BoundedRows(values, half_ulp, step * factor * ((1 + half_ulp) / 2))

    def _fp8(self, start: int, stop: int) -> BoundedRows:
        return _fp8_rows(self._take("weight", start, stop), torch.tensor(self.number("weights_scaling_factor")))

    def _fp8_row(self, start: int, stop: int) -> BoundedRows:
        return _fp8_rows(self._take("weight", start, stop), self._take("per_channel_scale", start, stop)[:, None])

    def _int8(self, start: int, stop: int) -> BoundedRows:
        scale = self._take("weights_scaling_factor", start, stop)[:, None]
        return self._unsmoothed(self._take("weight", start, stop).mul_(scale), scale)

    def _int4(self, start: int, stop: int) -> BoundedRows:
        packed = self.file.read_rows(f"{self.module}.weight", start // 2, -(-stop // 2)).to(torch.int32)
        low, high = (packed << 28) >> 28, packed >> 4  # both signed
        codes = torch.stack([low, high], dim=1).flatten(0, 1)  # row 2k is the low half
        codes = codes[start % 2 : start % 2 + stop - start]
        scales = self._take("weights_scaling_factor", start, stop)
        scales = scales.repeat_interleave(codes.shape[1] // scales.shape[1], dim=1)
        return self._unsmoothed(codes * scales, scales)

    def _fp4(self, start: int, stop: int) -> BoundedRows:
        packed = self.file.read_rows(f"{self.module}.weight", start, stop)
        codes = torch.stack([packed & 0xF, packed >> 4], dim=2).reshape(len(packed), -1).to(torch.int64)
        magnitude = FP4_VALUES[codes & 7]
        blocks = self._take("weights_scaling_factor", start, stop) * self.number("weights_scaling_factor_2")
        scales = blocks.repeat_interleave(codes.shape[1] // blocks.shape[1], dim=1)
        values = torch.where(codes >= 8, -magnitude, magnitude) * scales
        return BoundedRows(values, FP4_RELATIVE, scales * FP4_ABSOLUTE)


def _to_float(stored: torch.Tensor) -> torch.Tensor:
    """As float32; FP8 by way of float16, which has the same bits two places further on: torch's own cast takes six times as long."""
    if stored.dtype != torch.float8_e4m3fn:
        return stored.to(torch.float32)
    codes = stored.contiguous().view(torch.int8)
    sign_and_value = codes.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(FP8_IN_FLOAT16)
    values = sign_and_value.view(torch.float16).to(torch.float32).mul_(FP8_EXPONENT)
    magnitude = codes.view(torch.uint8) & FP8_NAN
    if magnitude.numel() and magnitude.max() == FP8_NAN:
        values[magnitude == FP8_NAN] = torch.nan
    return values


def _fp8_rows(codes: torch.Tensor, scale: torch.Tensor) -> BoundedRows:
    return BoundedRows(codes.mul_(scale), FP8_RELATIVE, scale * FP8_ABSOLUTE)


@dataclass(frozen=True)
class Decoder:
    """How an algorithm's weights are read.

    Attributes:
        rows: of the weight that the file's numbers stand for.
        packed_rows, packed_columns: of the weight, in one of the file's.
    """

    rows: Callable[[StoredLinear, int, int], BoundedRows]
    packed_rows: int = 1
    packed_columns: int = 1


# By quant_algo, of those whose weights are quantized in the file.
DECODERS: dict[str, Decoder] = {
    "FP8": Decoder(StoredLinear._fp8),
    "FP8_PER_CHANNEL_PER_TOKEN": Decoder(StoredLinear._fp8_row),
    "W8A8_SQ_PER_CHANNEL": Decoder(StoredLinear._int8),
    "W4A16_AWQ": Decoder(StoredLinear._int4, packed_rows=2),
    "W4A8_AWQ": Decoder(StoredLinear._int4, packed_rows=2),
    "NVFP4": Decoder(StoredLinear._fp4, packed_columns=2),
}


def rounded_inputs(
    algo: str | None, x: torch.Tensor, scale: float | None, smoothing: torch.Tensor | None
) -> torch.Tensor:
    """Activations as a quantized linear of that algorithm sees them.  # [..., in]

    Args:
        scale: the file's activation scale; None where there is none.
        smoothing: the file's factor of each input, undone again because the weights here are the source's.  # [in]
    """
    if algo not in INPUT_ROUNDING:
        return x
    factor = torch.ones(()) if smoothing is None else smoothing.to(torch.float32)
    return INPUT_ROUNDING[algo](x * factor, scale or 1.0) / factor


def _round_fp8(x: torch.Tensor, scale: Any) -> torch.Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.float32) * scale


def _round_token(x: torch.Tensor, _: float) -> torch.Tensor:
    return _round_fp8(x, x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 448)


def _round_int8(x: torch.Tensor, scale: float) -> torch.Tensor:
    return (x / scale).round().clamp(-128, 127) * scale


def _round_fp4(x: torch.Tensor, scale: float) -> torch.Tensor:
    blocks = x.reshape(*x.shape[:-1], -1, 16)
    steps = _round_fp8(blocks.abs().amax(dim=-1, keepdim=True) / 6, scale).clamp_min(scale * 2.0**-9)
    nearest = ((blocks.abs() / steps)[..., None] - FP4_VALUES).abs().argmin(dim=-1)
    return (FP4_VALUES[nearest] * blocks.sign() * steps).reshape(x.shape)


# By quant_algo, of those that round activations.
INPUT_ROUNDING: dict[str | None, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "FP8": _round_fp8,
    "FP8_PER_CHANNEL_PER_TOKEN": _round_token,
    "W8A8_SQ_PER_CHANNEL": _round_int8,
    "W4A8_AWQ": _round_fp8,
    "NVFP4": _round_fp4,
}
