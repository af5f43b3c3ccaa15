"""A decode step's time from bytes and operations: the roofline, and what it leaves out as parameters with stated defaults.

Every part of a step takes the longer of its bytes over the memory's bandwidth and its operations over the throughput, for
``batch * nodes`` rows; on top of that come launches, and all-reduces between ranks. Both rates are the data sheet's times an
efficiency. Nothing is fitted to a published time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import product

import numpy as np
import numpy.typing as npt

from medusa_export.core.errors import ConfigError
from medusa_export.heads.roofline.gpus import ARITHMETIC, BANDWIDTH, COLLECTIVE_US, KERNEL_US, Gpu
from medusa_export.heads.roofline.shape import HALF, ModelShape, Precision

Number = float | npt.NDArray[np.float64]  # an array has one value of each of several assumptions  # [S]
ACTIVATION_BYTES, LOGIT_BYTES = 2, 4  # activations are 16 bit, logits float32


@dataclass(frozen=True)
class Assumptions:
    """What a data sheet does not say. Defaults are for TensorRT-LLM: fused kernels, launched by a CUDA graph.

    Attributes:
        bandwidth: part of the memory's bandwidth that a decoder's kernels get. One large copy gets 0.9 on an H100.
        arithmetic: part of the tensor throughput that they get. One large product gets 0.8 on an H100.
        serial: part of the shorter of the two that is not hidden behind the longer one; 0 is the roofline.
        kernel_us: what a kernel takes besides, with its launch, in microseconds.
        collective_us: latency of an all-reduce or a gather between ranks, in microseconds.
        layer_kernels: kernels of a layer: norm, qkv, attention in two, dense, norm, fc, gate, activation, proj.
        base_kernels: kernels of a step that no layer has: embedding, masks, last norm, projection, acceptance.
        tree_kernels: kernels of drafting and acceptance that a step with a tree has on top, the heads' aside.
        head_kernels: kernels of a head besides those of its blocks: projection and best tokens.
        block_kernels: kernels of a residual block: linear, activation, sum.
        host_us: time of a launch on the host, where kernels are launched one by one; the GPU waits for it where it is faster.
    """

    bandwidth: Number = BANDWIDTH
    arithmetic: Number = ARITHMETIC
    serial: Number = 0.0
    kernel_us: Number = KERNEL_US
    collective_us: Number = COLLECTIVE_US
    layer_kernels: Number = 10.0
    base_kernels: Number = 8.0
    tree_kernels: Number = 6.0
    head_kernels: Number = 2.0
    block_kernels: Number = 3.0
    host_us: Number = 0.0

    def __post_init__(self) -> None:
        for name in ("bandwidth", "arithmetic"):
            part = np.asarray(getattr(self, name))
            if not (np.all(part > 0) and np.all(part <= 1)):
                raise ConfigError(f"{name}_efficiency", f"{part}", "more than 0 and at most 1", "correct it")
        if not np.all((serial := np.asarray(self.serial)) >= 0) or not np.all(serial <= 1):
            raise ConfigError("serial", f"{serial}", "0 .. 1", "correct it")


DEFAULTS = Assumptions()
# What the defaults may be off by; measured: one large kernel's 0.9 and 0.8. Where none is hidden is the other end of the roofline.
RANGES: dict[str, tuple[float, float]] = {
    "bandwidth": (0.65, 0.9),
    "arithmetic": (0.4, 0.8),
    "serial": (0.0, 0.5),
    "kernel_us": (1.5, 5.0),
    "collective_us": (6.0, 20.0),
}


def corners(around: Assumptions = DEFAULTS) -> Assumptions:
    """All at once: the assumptions themselves, then every combination of the ends of :data:`RANGES`, widened to hold them."""
    ends = [(min(low, getattr(around, name)), max(high, getattr(around, name))) for name, (low, high) in RANGES.items()]
    found = [replace(around, **dict(zip(RANGES, values, strict=True))) for values in product(*ends)]
    return stacked([around, *found])


def stacked(each: Sequence[Assumptions]) -> Assumptions:
    """Several as one, whose fields are arrays.  # [S] each"""
    return Assumptions(
        **{item.name: np.array([getattr(one, item.name) for one in each]) for item in fields(Assumptions)}
    )


@dataclass(frozen=True)
class Deployment:
    """A model on GPUs of one kind.

    Attributes:
        tp: tensor-parallel ranks, a GPU each.
        weights: of the layers' linears; the vocabulary projection is 16 bit.
        heads: of the heads' blocks and projections.
        kv_bits: of a cached value.
    """

    shape: ModelShape
    gpu: Gpu
    tp: int = 1
    weights: Precision = HALF
    heads: Precision = HALF
    kv_bits: int = 16

    def __post_init__(self) -> None:
        if self.tp < 1 or self.shape.attention_heads % self.tp:
            expected = f"a divisor of the {self.shape.attention_heads} attention heads"
            raise ConfigError("--tp", str(self.tp), expected, "choose another")
        for precision in (self.weights, self.heads):
            if precision.operations not in self.gpu.operations:
                got, has = f"{precision.operations} products", ", ".join(self.gpu.operations)
                raise ConfigError(self.gpu.name, got, f"what it has: {has}", "choose another format or GPU")

    def needed_bytes(self, batch: int, past: int, nodes: int = 1) -> float:
        """What a rank's GPU holds for a batch of sequences: weights, keys and values; activations not counted.

        Args:
            batch: sequences at once.
            past: tokens in the cache of each.
            nodes: tokens that a step adds to each.
        """
        cache = batch * (past + nodes) * self.shape.layers * self.shape.kv_values(self.tp) * self.kv_bits / 8
        return self.shape.resident_bytes(self.tp, self.weights, self.heads) + cache


@dataclass(frozen=True)
class StepParts:
    """Where a step's time goes, in milliseconds.

    Attributes:
        layers, attention, projection, heads: their weights and products; the cache; the vocabulary projection; all heads.
        collectives: between ranks.
        launches: and whatever else every kernel takes once.
        waiting: for a host that launches kernels one by one; 0 in a CUDA graph. What the host is late with in the layers is not
            made up for by the large kernels behind them: projection and heads are not launched yet.
    """

    layers: Number
    attention: Number
    projection: Number
    heads: Number
    collectives: Number
    launches: Number
    waiting: Number

    @property
    def total(self) -> Number:
        """The step's."""
        work = self.layers + self.attention + self.projection + self.heads
        return work + self.collectives + self.launches + self.waiting


def step_parts(
    deployment: Deployment,
    batch: int,
    nodes: int,
    past: int,
    *,
    medusa: bool = False,
    assumptions: Assumptions = DEFAULTS,
) -> StepParts:
    """A step that verifies ``nodes`` nodes of each of ``batch`` sequences behind ``past`` tokens.

    Args:
        deployment: model, formats and GPU.
        batch: sequences at once.
        nodes: tokens of each that the step verifies.
        past: tokens in the cache of each.
        assumptions: what no data sheet says.
        medusa: with all heads, on all rows, as TensorRT-LLM runs them whatever the tree's depth.
    """
    shape, tp, rows = deployment.shape, deployment.tp, batch * nodes
    time = _Times(deployment, assumptions)
    heads = shape.heads if medusa else 0
    blocks = heads * shape.head_layers
    layers = shape.layers * time.product(shape.layer_weights(tp), shape.layer_activations(tp), rows, deployment.weights)
    attention = shape.layers * time.attention(batch, nodes, past)
    projection = time.projection(rows, HALF)
    block = time.product(shape.block_weights(tp), 2 * shape.hidden, rows, deployment.heads)
    drafting = heads * time.projection(rows, deployment.heads) + blocks * block
    reduced = 2 * shape.layers * time.all_reduce(rows * shape.hidden)
    gathered = (1 + heads) * time.gather(rows * shape.vocab) + blocks * time.gather(rows * shape.hidden)
    inner, outer = shape.layers * assumptions.layer_kernels, _outer_kernels(heads, blocks, assumptions)
    return StepParts(
        layers, attention, projection, drafting, reduced + gathered,
        launches=(inner + outer) * assumptions.kernel_us / 1e3,
        waiting=time.waiting(inner, layers + attention + reduced) + time.waiting(outer, projection + drafting + gathered),
    )  # fmt: skip


def step_ms(
    deployment: Deployment,
    batch: int,
    nodes: int,
    past: int,
    *,
    medusa: bool = False,
    assumptions: Assumptions = DEFAULTS,
) -> Number:
    """Milliseconds of such a step, see :func:`step_parts`.

    Args:
        deployment: model, formats and GPU.
        batch: sequences at once.
        nodes: tokens of each that the step verifies.
        past: tokens in the cache of each.
        medusa: with all heads, on all rows.
        assumptions: what no data sheet says.
    """
    return step_parts(deployment, batch, nodes, past, medusa=medusa, assumptions=assumptions).total


def _outer_kernels(heads: int, blocks: int, assumed: Assumptions) -> Number:
    """Those that no layer has."""
    drafting = heads * assumed.head_kernels + blocks * assumed.block_kernels + (heads > 0) * assumed.tree_kernels
    return assumed.base_kernels + drafting


@dataclass(frozen=True)
class _Times:
    """Milliseconds of a step's pieces on one rank."""

    deployment: Deployment
    assumptions: Assumptions

    def product(self, weights: float, activations: float, rows: int, precision: Precision) -> Number:
        """Rows times matrices.

        Args:
            weights: of the matrices.
            activations: values that a row reads and writes.
        """
        moved = weights * precision.bits / 8 + rows * activations * ACTIVATION_BYTES
        return self._longer(moved, 2 * weights * rows, precision.operations)

    def projection(self, rows: int, precision: Precision) -> Number:
        """To the vocabulary, with logits that the next kernel reads."""
        shape, tp = self.deployment.shape, self.deployment.tp
        weights = shape.projection_weights(tp)
        moved = weights * precision.bits / 8 + rows * (shape.hidden * ACTIVATION_BYTES + shape.vocab * LOGIT_BYTES)
        return self._longer(moved, 2 * weights * rows, precision.operations)

    def attention(self, batch: int, nodes: int, past: int) -> Number:
        """Of one layer: the cache is read once a sequence, whatever the number of nodes."""
        deployment, shape = self.deployment, self.deployment.shape
        seen = min(past, shape.window or past) + nodes
        moved = batch * seen * shape.kv_values(deployment.tp) * deployment.kv_bits / 8
        return self._longer(moved, 4 * batch * nodes * seen * shape.query_width(deployment.tp), "fp16")

    def all_reduce(self, values: int) -> Number:
        """Sum of as many values over all ranks: each sends and gets every part but its own, twice."""
        return self._exchange(2 * values)

    def gather(self, values: int) -> Number:
        """All ranks' parts of as many values."""
        return self._exchange(values)

    def waiting(self, kernels: Number, work: Number) -> Number:
        """Milliseconds that the host takes to launch kernels with that many milliseconds of work."""
        assumed = self.assumptions
        return np.maximum(0.0, kernels * (assumed.host_us - assumed.kernel_us) / 1e3 - work)

    def _exchange(self, values: int) -> Number:
        """Sent by every rank; nothing where there is one."""
        if self.deployment.tp == 1:
            return 0.0
        tp, one_way = self.deployment.tp, self.deployment.gpu.link / 2
        sent = values * ACTIVATION_BYTES * (tp - 1) / tp
        return self.assumptions.collective_us / 1e3 + 1e3 * sent / (one_way * self.assumptions.bandwidth)

    def _longer(self, moved: float, operations: float, kind: str) -> Number:
        gpu, assumed = self.deployment.gpu, self.assumptions
        memory = 1e3 * moved / (gpu.bandwidth * assumed.bandwidth)
        arithmetic = 1e3 * operations / (gpu.operations[kind] * assumed.arithmetic)
        return np.maximum(memory, arithmetic) + assumed.serial * np.minimum(memory, arithmetic)
