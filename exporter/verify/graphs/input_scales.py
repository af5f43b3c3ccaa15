"""The scales that activations are rounded with in a graph, and its smoothing factors, against the recorded calibration."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from onnx import TensorProto

from medusa_export.exporter.verify.graphs.onnx_file import OnnxFile
from medusa_export.exporter.verify.graphs.weights import FACTOR, FUSED, OUTPUT_FACTOR
from medusa_export.exporter.verify.scales_file import FP4, FP8, INT8, ScalesFile

ROUNDED = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # a scale in that dtype, rounded up
SCALE = ".input_scale"


def input_scale_problems(file: OnnxFile, scales: ScalesFile) -> Iterator[str]:
    """Scales of a graph that differ from what the calibration gives."""
    smoothed = any(name.endswith(FACTOR) for name in file.initializers)
    for name in file.initializers:
        if name.endswith(SCALE):
            yield from _scale(file, name, scales, smoothed)
        elif name.endswith(FACTOR):
            stored, factors = file.value(name), scales.factors(_modules(name.removesuffix(FACTOR), True)[0])
            if factors is None or stored.shape != factors.shape or not torch.equal(stored, factors.to(stored.dtype)):
                yield f"{name} is not what scales.safetensors gives"
        elif name.endswith(OUTPUT_FACTOR):
            stored, factors = file.value(name), scales.factors(f"{name.rpartition('.mlp.')[0]}.mlp.down_proj")
            if factors is None or not torch.equal(stored[-len(factors) :], factors.to(stored.dtype)):
                yield f"{name} is not what scales.safetensors gives"


def _scale(file: OnnxFile, name: str, scales: ScalesFile, smoothed: bool) -> Iterator[str]:
    stored = file.value(name)
    amax = scales.amax("input_amax", _modules(name.removesuffix(SCALE), smoothed))
    code = next((code for code in (_code(file, name),) if code), FP8)
    found = float(stored.to(torch.float64).max())
    if amax is None:
        yield f"{name}: scales.safetensors has no calibration for it"
    elif not -1e-6 <= found / (amax / code) - 1 <= ROUNDED.get(stored.dtype, 1e-6):
        yield f"{name} is {found:.6g}; scales.safetensors gives {amax / code:.6g}"


def _code(file: OnnxFile, name: str) -> float:
    """The largest code of what the scale rounds to, by the operator that reads it."""
    for node in file.consumers(name):
        if node.op_type == "TRT_FP4DynamicQuantize":
            return FP4 * FP8
        if node.op_type == "QuantizeLinear" and len(node.input) > 2:
            zero = file.initializers.get(node.input[2])
            return INT8 if zero is not None and zero.data_type == TensorProto.INT8 else FP8
    return 0.0


def _modules(name: str, smoothed: bool) -> list[str]:
    """The linears that share the scale: fused ones, and gate with up unless their inputs are smoothed."""
    base, _, more = name.partition("+")
    owner, _, last = base.rpartition(".")
    if last == "up_proj" and not smoothed:
        last = "gate_proj"
    group = FUSED.get(last, (last,))
    if not more and (smoothed or last != "gate_proj"):
        group = (base.rpartition(".")[2],)
    return [f"{owner}.{module}" for module in group]
