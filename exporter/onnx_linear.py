"""How a linear's weights are stored in ONNX: float, int8 blocks, or the very FP8 values of the TensorRT-LLM checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from onnx import TensorProto

from medusa_export.exporter.onnx_builder import GraphBuilder
from medusa_export.heads.checkpoint import row_chunks
from medusa_export.heads.errors import ConfigError
from medusa_export.heads.model import MedusaCheckpoint
from medusa_export.quantize.scales import Scales, fused_scale, quantize_fp8

INT8_BLOCKS = (128, 64, 32, 16)  # sizes that ONNX Runtime's MatMulNBits takes, largest that divides wins


@dataclass(frozen=True)
class LinearWriter:
    """Adds ``x @ W.T + b`` for one linear or several fused ones (same input, outputs concatenated).

    Attributes:
        form: "float", "int8" or "fp8".
        scales: calibrated scales; needed by "fp8".
        fp8_activations: quantize-dequantize the input with the calibrated scale, as TensorRT-LLM does.
    """

    checkpoint: MedusaCheckpoint
    form: str
    scales: Scales | None = None
    fp8_activations: bool = False

    def __call__(self, graph: GraphBuilder, x: str, modules: Sequence[str], *, scale_with: Sequence[str] = ()) -> str:
        """Add the product.  # x [..., K] -> [..., sum of N]

        Args:
            x: name of the input value.
            modules: Hugging Face module names, fused in this order.
            scale_with: further modules that share the FP8 scales (gate_proj and up_proj, which TensorRT-LLM fuses).
        """
        name = modules[0] if len(modules) == 1 else f"{modules[0]}+{len(modules) - 1}"
        weight = _FORMS[self.form](self, graph, name, modules, scale_with)
        if self.fp8_activations:
            x = self._fake_quantize(graph, x, name, [*modules, *scale_with])
        out = graph.node("MatMul", [x, weight])
        bias = self._bias(modules)
        return out if bias is None else graph.node("Add", [out, graph.tensor(f"{name}.bias", bias)])

    def _bias(self, modules: Sequence[str]) -> torch.Tensor | None:
        names = [f"{module}.bias" for module in modules]
        if names[0] not in self.checkpoint.config.tensor_shapes():
            return None
        return torch.cat([self.checkpoint.read(bias).float() for bias in names])

    def _required_scales(self) -> Scales:
        if self.scales is None:
            raise ConfigError("fp8", "no calibrated scales", "scales from calibration", "calibrate before writing")
        return self.scales

    def _fake_quantize(self, graph: GraphBuilder, x: str, name: str, modules: Sequence[str]) -> str:
        value = fused_scale(self._required_scales().input_amax, modules)
        scale = graph.tensor(f"{name}.input_scale", torch.tensor(value, dtype=torch.float32))
        zero = graph.tensor("fp8_zero", torch.zeros((), dtype=torch.float8_e4m3fn))
        return graph.node("DequantizeLinear", [graph.node("QuantizeLinear", [x, scale, zero]), scale])

    def _float(self, graph: GraphBuilder, name: str, modules: Sequence[str], scale_with: Sequence[str]) -> str:
        """[K, N] in the checkpoint's dtype; a Cast that ONNX Runtime folds when the session is made."""
        weight = torch.cat([self.checkpoint.read(f"{module}.weight") for module in modules]).T
        stored = graph.tensor(f"{name}.weight", weight)
        return stored if weight.dtype == torch.float32 else graph.node("Cast", [stored], to=TensorProto.FLOAT)

    def _fp8(self, graph: GraphBuilder, name: str, modules: Sequence[str], scale_with: Sequence[str]) -> str:
        """[K, N] float8_e4m3fn under one scale, the largest of all modules that TensorRT-LLM fuses with these."""
        scale = fused_scale(self._required_scales().weight_amax, [*modules, *scale_with])
        parts = [
            quantize_fp8(self.checkpoint.read(f"{module}.weight"), scale).view(torch.uint8) for module in modules
        ]  # [N, K] each
        stored = graph.tensor(f"{name}.weight", torch.cat(parts).T.contiguous().view(torch.float8_e4m3fn))
        scalar = graph.tensor(f"{name}.weight_scale", torch.tensor(scale, dtype=torch.float32))
        return graph.node("DequantizeLinear", [stored, scalar])

    def _int8(self, graph: GraphBuilder, name: str, modules: Sequence[str], scale_with: Sequence[str]) -> str:
        weight = torch.cat([self.checkpoint.read(f"{module}.weight") for module in modules])
        return int8_matrix(graph, name, weight)


_FORMS: dict[str, Callable[[LinearWriter, GraphBuilder, str, Sequence[str], Sequence[str]], str]] = {
    "float": LinearWriter._float,
    "fp8": LinearWriter._fp8,
    "int8": LinearWriter._int8,
}


def int8_matrix(graph: GraphBuilder, name: str, weight: torch.Tensor) -> str:
    """[N, K] stored as [K, N] uint8 in blocks along K; ONNX Runtime fuses DequantizeLinear and MatMul into MatMulNBits."""
    values, scales = quantize_int8_blocks(weight, name)
    stored = graph.tensor(f"{name}.weight", values.T)
    scale = graph.tensor(f"{name}.weight_scale", scales.T)
    zero = graph.tensor(f"{name}.weight_zero", torch.full(scales.T.shape, 128, dtype=torch.uint8))
    return graph.node("DequantizeLinear", [stored, scale, zero], axis=0, block_size=weight.shape[1] // scales.shape[1])


def quantize_int8_blocks(weight: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric 8-bit blocks along the input dimension.

    Args:
        weight: [N, K].
        name: for the error message.

    Returns:
        uint8 values around the zero point 128, [N, K], and float32 scales, [N, K / block].
    """
    rows, width = weight.shape
    block = next((size for size in INT8_BLOCKS if width % size == 0), None)
    if block is None:
        raise ConfigError(name, f"{width} input features", "a multiple of 16", "use --quant none or fp8")
    values, scales = torch.empty((rows, width), dtype=torch.uint8), torch.empty(rows, width // block)
    start = 0
    for part in row_chunks(weight):
        groups = part.float().reshape(len(part), width // block, block)
        scale = groups.abs().amax(dim=-1).clamp_min(1e-12) / 127.0  # [n, K / block]
        rounded = (groups / scale[..., None]).round().clamp(-127, 127) + 128
        values[start : start + len(part)] = rounded.reshape(len(part), width)  # whole numbers, so the cast is exact
        scales[start : start + len(part)] = scale
        start += len(part)
    return values, scales
