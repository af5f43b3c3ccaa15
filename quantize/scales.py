"""What calibration yields: the largest magnitudes seen, by module name, and the FP8 arithmetic on them.

Source of the formulas: ModelOpt's ``export_tensorrt_llm_checkpoint`` and TensorRT-LLM's FP8 linears: a scale is
``amax / 448``, a stored weight is ``weight / scale``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from medusa_export.heads.config import read_json
from medusa_export.heads.errors import CheckpointError

FP8_MAX = 448.0  # the largest finite float8_e4m3fn
MIN_KV_SCALE = 1.0  # TensorRT-LLM's recommended default; smaller ones cost accuracy where later tokens are larger


@dataclass(frozen=True)
class Scales:
    """Largest magnitudes from calibration; unitless, in the model's own numbers.

    Attributes:
        input_amax: of the input of a linear, by Hugging Face module name (``model.layers.0.self_attn.q_proj``,
            ``medusa_heads.0.0.linear``, ``medusa_heads.0.1``).
        weight_amax: of its weight.
        kv_amax: of keys and values together, by layer.
    """

    input_amax: dict[str, float] = field(default_factory=dict)
    weight_amax: dict[str, float] = field(default_factory=dict)
    kv_amax: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, table in (("input", self.input_amax), ("weight", self.weight_amax), ("kv", self.kv_amax)):
            _check(what, table)

    def require(self, modules: Iterable[str], layers: Iterable[int]) -> None:
        """Raise CheckpointError unless every module has both scales and every layer its cache scale."""
        wanted = list(modules)
        missing = [name for name in wanted if name not in self.input_amax or name not in self.weight_amax]
        missing += [f"layer {layer} kv" for layer in layers if layer not in self.kv_amax]
        if missing:
            raise CheckpointError(
                f"scales of {missing[0]}",
                f"{len(missing)} missing",
                "a scale for everything that is quantized",
                "calibrate again with the same format, kv cache and heads as the export",
            )

    def save(self, path: Path) -> None:
        """Write JSON; floats keep every digit, so a loaded copy compares equal."""
        body = {
            "input_amax": self.input_amax,
            "weight_amax": self.weight_amax,
            "kv_amax": {str(layer): amax for layer, amax in self.kv_amax.items()},
        }
        path.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Scales:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: no such file, or not JSON.
            CheckpointError: JSON that is not scales, or a scale that is not finite and above 0.
        """
        body = read_json(path)
        try:
            return cls(
                {str(name): float(amax) for name, amax in body["input_amax"].items()},
                {str(name): float(amax) for name, amax in body["weight_amax"].items()},
                {int(layer): float(amax) for layer, amax in body["kv_amax"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                str(path), f"{type(error).__name__} {error}", "saved scales", "calibrate again"
            ) from error


def fp8_scale(amax: float) -> float:
    """The FP8 scale of a tensor whose largest magnitude is ``amax``, rounded to the float32 that files hold."""
    return float(torch.tensor(amax, dtype=torch.float32) / FP8_MAX)


def kv_scale(amax: float) -> float:
    """The FP8 key/value cache scale: never below 1, so that tokens larger than the calibrated ones do not saturate."""
    return max(MIN_KV_SCALE, fp8_scale(amax))


def fused_scale(amax: Mapping[str, float], modules: Iterable[str]) -> float:
    """One FP8 scale for linears stored as one tensor (q, k and v): the largest of theirs."""
    return fp8_scale(max(amax[name] for name in modules))


def quantize_fp8(weight: torch.Tensor, scale: float) -> torch.Tensor:
    """``weight / scale`` in float8_e4m3fn; computed in float32 and saturating on every torch release.

    Args:
        weight: any floating dtype.  # [out, in]
        scale: float32 value above 0.

    Returns:
        float8_e4m3fn.  # [out, in]
    """
    scaled = weight.to(torch.float32) / scale
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def dequantize_fp8(weight: torch.Tensor, scale: float) -> torch.Tensor:
    """The float32 weight that a stored FP8 weight stands for.  # [out, in]"""
    return weight.to(torch.float32) * scale


def _check(what: str, table: Mapping[str, float] | Mapping[int, float]) -> None:
    for name, amax in table.items():
        if not math.isfinite(amax) or amax <= 0:
            raise CheckpointError(
                f"{what} amax of {name}",
                str(amax),
                "a finite number above 0",
                "train heads before quantizing them (zero weights have no scale), or check the weights for NaN",
            )
