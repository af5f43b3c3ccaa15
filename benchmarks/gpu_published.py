"""What others measured with Medusa on GPUs, as they published it, and the shapes of their models, for gpu_estimates.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from medusa_export.heads.roofline.gpus import BY_KEY, Gpu
from medusa_export.heads.roofline.shape import HALF, ModelShape, Precision
from medusa_export.heads.roofline.step import DEFAULTS, Assumptions, Deployment

HEADS = (
    4  # medusa_choices of the published 7B heads are four deep; a longer head costs another 2 % of a 7B model's step
)
NODES, PAST = 64, 512  # of medusa-v1's tree, the root included; a chat's middle
# Kernels of transformers' Llama without fused attention: 46 a layer and 33 around, counted by tests/benchmarks/test_gpu_estimates.py.
# Medusa's own loop (medusa/model/utils.py) has some 50 for candidates, acceptance and the cache. A launch from Python takes some
# 10 us: 4 to 6 in the driver, the rest in PyTorch and Python.
EAGER = replace(DEFAULTS, layer_kernels=46.0, base_kernels=33.0, tree_kernels=50.0, host_us=10.0)
FP8 = Precision(8, "fp8")
A100_PCIE = replace(
    BY_KEY["a100-80gb"],
    name="A100-80GB PCIe",
    bandwidth=1.935e12,
    sources={"bandwidth": "NVIDIA A100 data sheet, PCIe"},
)

PAPER = "Medusa, arXiv 2401.10774"
SPEC_BENCH = "Spec-Bench, Leaderboard.md at 09244ff"
BLOG = "NVIDIA's blog, September 2024: Low Latency Inference Chapter 1"

SHAPES: Mapping[str, ModelShape] = {
    "Vicuna 7B": ModelShape(32, 4096, 11008, 32, 32, 128, 32000, HEADS, 1),
    "Vicuna 13B": ModelShape(40, 5120, 13824, 40, 40, 128, 32000, HEADS, 1),
    "Vicuna 33B": ModelShape(60, 6656, 17920, 52, 52, 128, 32000, HEADS, 1),
    "Zephyr 7B": ModelShape(32, 4096, 14336, 32, 8, 128, 32000, HEADS, 1, 4096),
    "Llama 3.1 70B": ModelShape(80, 8192, 28672, 64, 8, 128, 128256, HEADS, 1),
    "Llama 3.1 405B": ModelShape(126, 16384, 53248, 128, 8, 128, 128256, HEADS, 1),
}


@dataclass(frozen=True)
class Point:
    """A published figure.

    Attributes:
        what: "overhead", the time of a step with the tree over one without; or "tokens/s", of decoding without Medusa.
        tokens_per_step, speedup: as published beside it; 0 where not.
        derived: whether the figure is not printed as such but follows from the two: tokens per step over speed-up for an overhead.
    """

    model: str
    gpu: Gpu
    what: str
    published: float
    source: str
    assumptions: Assumptions
    tokens_per_step: float = 0.0
    speedup: float = 0.0
    derived: bool = False
    tp: int = 1
    weights: Precision = HALF
    kv_bits: int = 16

    @property
    def deployment(self) -> Deployment:
        """What was measured there."""
        return Deployment(SHAPES[self.model], self.gpu, self.tp, self.weights, HALF, self.kv_bits)


def _paper(model: str, overhead: float, tokens: float, speedup: float) -> Point:
    return Point(model, A100_PCIE, "overhead", overhead, PAPER, EAGER, tokens, speedup)


def _spec_bench(model: str, gpu: str, tokens: float, speedup: float) -> Point:
    return Point(model, BY_KEY[gpu], "overhead", tokens / speedup, SPEC_BENCH, EAGER, tokens, speedup, derived=True)


def _blog(model: str, tokens_per_second: float, speedup: float) -> Point:
    plain = tokens_per_second / speedup
    return Point(
        model,
        BY_KEY["h200"],
        "tokens/s",
        plain,
        BLOG,
        DEFAULTS,
        0.0,
        speedup,
        derived=True,
        tp=8,
        weights=FP8,
        kv_bits=8,
    )


POINTS = (
    _paper("Vicuna 7B", 1.22, 3.47, 2.83),
    _paper("Vicuna 13B", 1.23, 3.51, 2.83),
    _paper("Vicuna 33B", 1.27, 3.01, 2.35),
    _paper("Zephyr 7B", 1.18, 3.14, 2.66),
    _spec_bench("Vicuna 7B", "rtx3090", 2.32, 1.44),
    _spec_bench("Vicuna 7B", "a100-80gb", 2.32, 1.78),
    _spec_bench("Vicuna 13B", "a100-80gb", 2.39, 1.75),
    _spec_bench("Vicuna 33B", "a100-80gb", 2.33, 1.79),
    _blog("Llama 3.1 70B", 268.0, 1.5),
    _blog("Llama 3.1 405B", 108.0, 1.9),
)
