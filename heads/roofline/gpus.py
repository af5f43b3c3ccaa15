"""The one table of GPUs: what an engine fits into and what a step can take at best. Each figure has its source.

Throughput is dense, without structured sparsity; data sheets often print the figure with it, which is twice as much.
A GB is 10^9 bytes. Compute capabilities: developer.nvidia.com/cuda-gpus.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from medusa_export.core.errors import ConfigError

# What kernels reach of the figures below, and what they take besides: defaults of ``Assumptions`` in step.py.
BANDWIDTH, ARITHMETIC, KERNEL_US, COLLECTIVE_US = 0.8, 0.6, 2.5, 10.0


@dataclass(frozen=True)
class Gpu:
    """A product.

    Attributes:
        key: what a user types.
        name: what is printed.
        sm: compute capability as 10 * major + minor.
        memory: bytes.
        bandwidth: of its memory, bytes a second.
        operations: dense tensor operations a second (a multiply-add is two) by what is multiplied: "fp16" (bfloat16 too),
            "fp8", "fp4" or "int8"; a missing one is not in the hardware. On GeForce with accumulation in float32.
        link: bytes a second to other GPUs, both directions together: NVLink, or PCIe where there is none.
        data_centre: not a GeForce.
        sources: figure -> the sheet that states it.
    """

    key: str
    name: str
    sm: int
    memory: int
    bandwidth: float
    operations: Mapping[str, float]
    link: float
    data_centre: bool = True
    sources: Mapping[str, str] = field(repr=False, default_factory=dict)


def _sources(sheet: str, **others: str) -> dict[str, str]:
    """Every figure from one sheet but those named."""
    return {name: others.get(name, sheet) for name in ("memory", "bandwidth", "operations", "link")}


A100 = "NVIDIA A100 Tensor Core GPU data sheet"
AMPERE = "NVIDIA A100 Tensor Core GPU Architecture white paper"
GA102 = "NVIDIA Ampere GA102 GPU Architecture white paper, appendix A (GeForce RTX 3090)"
L40S = "NVIDIA L40S data sheet"
ADA = "NVIDIA Ada GPU Architecture white paper, appendix A (GeForce RTX 4090)"
H100, H200 = "NVIDIA H100 Tensor Core GPU data sheet, SXM", "NVIDIA H200 Tensor Core GPU data sheet, SXM"
B200 = "NVIDIA HGX B200 data sheet, figures of the board divided by eight"
B200_MEMORY = "NVIDIA's announcement of Blackwell at GTC 2024"

HOPPER_OPERATIONS = {"fp16": 989e12, "fp8": 1979e12, "int8": 1979e12}
AMPERE_OPERATIONS = {"fp16": 312e12, "int8": 624e12}

GPUS = (
    Gpu(
        "a100-40gb", "A100-40GB", 80, 40 * 10**9, 1.555e12, AMPERE_OPERATIONS, 600e9,
        sources=_sources(AMPERE),
    ),
    Gpu(
        "a100-80gb", "A100-80GB", 80, 80 * 10**9, 2.039e12, AMPERE_OPERATIONS, 600e9,
        sources=_sources(f"{A100}, SXM"),
    ),
    Gpu(
        "rtx3090", "RTX-3090-24GB", 86, 24 * 10**9, 0.936e12, {"fp16": 71e12, "int8": 284e12}, 112.5e9,
        False, _sources(GA102, link=f"{GA102}: NVLink bridge of two"),
    ),
    Gpu(
        "l40s", "L40S-48GB", 89, 48 * 10**9, 0.864e12, {"fp16": 362e12, "fp8": 733e12, "int8": 733e12}, 64e9,
        sources=_sources(L40S, link=f"{L40S}: PCIe Gen4 x16"),
    ),
    Gpu(
        "rtx4090", "RTX-4090-24GB", 89, 24 * 10**9, 1.008e12, {"fp16": 165.2e12, "fp8": 330.3e12, "int8": 660.6e12}, 64e9,
        False, _sources(ADA, link=f"{ADA}: PCIe Gen4 x16"),
    ),
    Gpu("h100", "H100-80GB", 90, 80 * 10**9, 3.35e12, HOPPER_OPERATIONS, 900e9, sources=_sources(H100)),
    Gpu("h200", "H200-141GB", 90, 141 * 10**9, 4.8e12, HOPPER_OPERATIONS, 900e9, sources=_sources(H200)),
    Gpu(
        "b200", "B200-192GB", 100, 192 * 10**9, 8.0e12,
        {"fp16": 2250e12, "fp8": 4500e12, "fp4": 9000e12, "int8": 4500e12}, 1800e9, sources=_sources(B200, memory=B200_MEMORY),
    ),
)  # fmt: skip
BY_KEY = {gpu.key: gpu for gpu in GPUS}


def find_gpu(key: str, flag: str = "--gpu") -> Gpu:
    """The GPU that a user typed.

    Raises:
        ConfigError: no such row.
    """
    found = BY_KEY.get(key.lower())
    if found is None:
        raise ConfigError(flag, repr(key), f"one of {', '.join(BY_KEY)}", "pick one of them")
    return found
