"""``scales.safetensors`` against the scales in every rank file: the calibration that was recorded is the one that was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medusa_export.exporter.verify.rebuild import hf_modules
from medusa_export.heads.checkpoint.tensor_source import TensorSource

FP8, INT8, FP4 = 448.0, 127.0, 6.0  # largest codes


@dataclass(frozen=True)
class LargestCodes:
    """The code of the largest weight, and of the largest input; None where the file has no scale of it."""

    weight: float | None
    input: float | None
    weight_name: str = "weights_scaling_factor"


CODES: dict[str | None, LargestCodes] = {
    "FP8": LargestCodes(FP8, FP8),
    "W8A8_SQ_PER_CHANNEL": LargestCodes(None, INT8),
    "W4A8_AWQ": LargestCodes(FP8, FP8, "weights_scaling_factor_2"),
    "NVFP4": LargestCodes(FP4 * FP8, FP4 * FP8, "weights_scaling_factor_2"),
}
KV_CODES = {"FP8": (FP8, 1.0), "INT8": (INT8, 0.0)}  # largest code, smallest scale
DTYPES = {**dict.fromkeys(("input_amax", "weight_amax", "kv_amax"), "float64"), "pre_quant_scale": "float32"}
TOLERANCE = 1e-6  # relative; float32 against float64


class ScalesFile:
    """The recorded calibration.

    Raises:
        CheckpointError: no such file.
    """

    def __init__(self, path: Path) -> None:
        self.source = TensorSource.open(path)

    def problems(self) -> list[str]:
        """What is no calibration: another dtype than is written, or a value that is no magnitude."""
        found = []
        for name in self.source.names:
            dtype, value = self.source.dtype(name), self.source.read(name).to(torch.float64)
            if dtype != DTYPES.get(name.partition("/")[0], dtype):
                found.append(f"{name} is {dtype}; expected {DTYPES[name.partition('/')[0]]}")
            elif not bool((torch.isfinite(value) & (value > 0)).all()):
                found.append(f"{name} has a value that is not finite and above 0")
        return found

    def amax(self, kind: str, modules: Sequence[str]) -> float | None:
        """The largest magnitude of linears that share a scale; None where one is missing."""
        names = [f"{kind}/{module}" for module in modules]
        if not all(name in self.source for name in names):
            return None
        return max(float(self.source.read(name).to(torch.float64).max()) for name in names)

    def factors(self, module: str) -> torch.Tensor | None:
        """What a linear's input is multiplied with.  # [in]"""
        name = f"pre_quant_scale/{module}"
        return self.source.read(name) if name in self.source else None

    def summary(self) -> dict[str, dict[str, float]]:
        """Count, smallest and largest of every kind, as the manifest records them."""
        kinds: dict[str, list[torch.Tensor]] = {}
        for name in self.source.names:
            kinds.setdefault(name.partition("/")[0], []).append(self.source.read(name))
        return {
            kind: {"count": len(values), "min": min(float(v.min()) for v in values), "max": max(float(v.max()) for v in values)}
            for kind, values in kinds.items()
        }  # fmt: skip


def scale_differences(config: Mapping[str, Any], files: Sequence[TensorSource], scales: ScalesFile) -> list[str]:
    """Scales of the ranks that differ from what the calibration gives, one line each.

    Args:
        config: body of config.json.
        files: rank files, in their order.
        scales: of the calibration.
    """
    return [
        f"rank{rank}: {line}"
        for rank, file in enumerate(files)
        for line in _rank(config, rank, file, len(files), scales)
    ]


def _rank(config: Mapping[str, Any], rank: int, file: TensorSource, tp: int, scales: ScalesFile) -> Iterator[str]:
    quantization = config["quantization"]
    codes = CODES.get(quantization.get("quant_algo"), LargestCodes(None, None))
    for name in file.names:
        module, _, kind = name.rpartition(".")
        if kind == "kv_cache_scaling_factor":
            code, least = KV_CODES[quantization["kv_cache_quant_algo"]]
            yield from _differs(name, file, scales.amax("kv_amax", [module.split(".")[2]]), code, least)
        elif kind == "activation_scaling_factor" and codes.input:
            yield from _differs(name, file, scales.amax("input_amax", _sharing(config, module, file)), codes.input)
        elif kind == codes.weight_name and codes.weight:
            yield from _differs(name, file, scales.amax("weight_amax", _sharing(config, module, file)), codes.weight)
        elif kind == "prequant_scaling_factor":
            for linear in hf_modules(module, config["num_medusa_layers"]):  # linears in one matrix share the factors
                yield from _factors(name, file, scales.factors(linear), rank, tp)


def _sharing(config: Mapping[str, Any], module: str, file: TensorSource) -> list[str]:
    """The linears whose largest value a scale is made of: those in one matrix, and fc with gate unless inputs are smoothed."""
    modules = hf_modules(module, config["num_medusa_layers"])
    if module.endswith((".mlp.fc", ".mlp.gate")) and f"{module}.prequant_scaling_factor" not in file:
        owner = modules[0].rpartition(".")[0]
        return [f"{owner}.gate_proj", f"{owner}.up_proj"]
    return modules


def _differs(name: str, file: TensorSource, amax: float | None, code: float, least: float = 0.0) -> Iterator[str]:
    found = float(file.read(name).to(torch.float64).max())
    if amax is None:
        yield f"{name}: scales.safetensors has no calibration for it"
    elif not abs(found - max(amax / code, least)) <= TOLERANCE * max(amax / code, least):
        yield f"{name} is {found:.6g}; scales.safetensors gives {max(amax / code, least):.6g}"


def _factors(name: str, file: TensorSource, factors: torch.Tensor | None, rank: int, tp: int) -> Iterator[str]:
    if factors is None:
        yield f"{name}: scales.safetensors has no factors for it"
        return
    stored = file.read(name)
    if len(stored) * tp == len(factors) and tp > 1:
        factors = factors[rank * len(stored) : (rank + 1) * len(stored)]
    if stored.shape != factors.shape or not torch.equal(stored, factors.to(stored.dtype)):
        yield f"{name} is not what scales.safetensors gives"
