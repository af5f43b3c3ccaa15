"""How a linear's weights are stored in ONNX: float, integer blocks, or the very codes of the TensorRT-LLM checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from onnx import TensorProto

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.onnx.builder import GraphBuilder
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.checkpoint.tensor_source import row_chunks
from medusa_export.quantize import numerics as codes
from medusa_export.quantize.format_facts import INT4_BLOCKS, INT8_BLOCKS
from medusa_export.quantize.formats import FP8_MAX, INT8_MAX
from medusa_export.quantize.numerics import code_scale, fused_amax, fused_scale, quantize_fp8
from medusa_export.quantize.scales import Scales

BOUNDS = {torch.float8_e4m3fn: FP8_MAX, torch.int8: INT8_MAX}  # of activations


@dataclass(frozen=True)
class LinearWriter:
    """Adds ``x @ W.T + b`` for one linear or several fused ones (same input, outputs concatenated).

    Attributes:
        form: key of ``LINEAR_FORMS``.
        scales: calibrated scales; needed by "fp8", "int8_row" and "int4_awq".
        activations: dtype that the input is quantized to and back with the calibrated scale, as TensorRT-LLM does; or None.
        group_size: inputs that share a scale; needed by "int4_awq".
        excluded: whether a module stays in float.
    """

    checkpoint: MedusaCheckpoint
    form: str
    scales: Scales | None = None
    activations: torch.dtype | None = None
    group_size: int | None = None
    excluded: Callable[[str], bool] = lambda module: False

    def __call__(self, graph: GraphBuilder, x: str, modules: Sequence[str], *, scale_with: Sequence[str] = ()) -> str:
        """Add the product.  # x [..., K] -> [..., sum of N]

        Args:
            x: name of the input value.
            modules: Hugging Face module names, fused in this order.
            scale_with: further modules that share the FP8 scales (gate_proj and up_proj, which TensorRT-LLM fuses).
        """
        name = modules[0] if len(modules) == 1 else f"{modules[0]}+{len(modules) - 1}"
        is_float = self.excluded(modules[0])
        form = FLOAT if is_float else self.form
        smooths = LINEAR_FORMS[form].smooths
        if smooths:
            x = graph.node("Mul", [x, graph.tensor(f"{name}.pre_quant_scale", self._smoothing(modules))])
        weight = LINEAR_FORMS[form].weights(self, graph, name, modules, scale_with)
        if self.activations is not None and not is_float:
            x = self._fake_quantize(graph, x, name, modules if smooths else [*modules, *scale_with])
        out = graph.node("MatMul", [x, weight])
        bias = self._bias(modules)
        return out if bias is None else graph.node("Add", [out, graph.tensor(f"{name}.bias", bias)])

    def takes_as_one(self, modules: Sequence[str]) -> bool:
        """Whether a product of several modules is the same as theirs, side by side."""
        return is_one_product(self.form, [self.excluded(module) for module in modules])

    @property
    def in_blocks(self) -> bool:
        """Whether ONNX Runtime keeps the weights as they are, in blocks; it makes float32 of the others."""
        return LINEAR_FORMS[self.form].in_blocks

    def _bias(self, modules: Sequence[str]) -> torch.Tensor | None:
        names = [f"{module}.bias" for module in modules]
        if names[0] not in self.checkpoint.config.tensor_shapes():
            return None
        return torch.cat([self.checkpoint.read(bias).float() for bias in names])

    def _required_scales(self) -> Scales:
        if self.scales is None:
            raise ConfigError(self.form, "no calibrated scales", "scales from calibration", "calibrate before writing")
        return self.scales

    def _smoothing(self, modules: Sequence[str]) -> torch.Tensor:
        return self._required_scales().pre_quant_scale[modules[0]]  # fused modules share it

    def _fake_quantize(self, graph: GraphBuilder, x: str, name: str, modules: Sequence[str]) -> str:
        assert self.activations is not None
        value = code_scale(fused_amax(self._required_scales().input_amax, modules), BOUNDS[self.activations])
        scale = graph.tensor(f"{name}.input_scale", torch.tensor(value, dtype=torch.float32))
        zero = graph.tensor(f"{str(self.activations)[6:]}_zero", torch.zeros((), dtype=self.activations))
        return graph.node("DequantizeLinear", [graph.node("QuantizeLinear", [x, scale, zero]), scale])

    def _read(self, modules: Sequence[str]) -> torch.Tensor:
        """The stacked weights, as stored.  # [N, K]"""
        return torch.cat([self.checkpoint.read(f"{module}.weight") for module in modules])

    def _smoothed(self, modules: Sequence[str]) -> torch.Tensor:
        return self._read(modules).float() * (1.0 / self._smoothing(modules))

    def _float(self, graph: GraphBuilder, name: str, modules: Sequence[str], scale_with: Sequence[str]) -> str:
        """[K, N] in the checkpoint's dtype; a Cast that ONNX Runtime folds when the session is made."""
        weight = self._read(modules).T
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

    def _fp8_row(self, graph: GraphBuilder, name: str, modules: Sequence[str], scale_with: Sequence[str]) -> str:
        """[K, N] float8_e4m3fn with a scale an output."""
        weight = self._read(modules).float()
        scales = codes.row_scales(weight, FP8_MAX)
        stored = quantize_fp8(weight, scales[:, None]).view(torch.uint8).T.contiguous().view(torch.float8_e4m3fn)
        return _per_output(graph, name, stored, scales)

    def _int8_row(self, graph: GraphBuilder, name: str, modules: Sequence[str], scale_with: Sequence[str]) -> str:
        """[K, N] int8 with a scale an output, smoothed."""
        weight = self._smoothed(modules)
        scales = codes.row_scales(weight, INT8_MAX)
        return _per_output(graph, name, codes.int8_rows(weight, scales).T, scales)

    def _int8(self, graph: GraphBuilder, name: str, modules: Sequence[str], scale_with: Sequence[str]) -> str:
        return int8_matrix(graph, name, self._read(modules))

    def _int4(self, graph: GraphBuilder, name: str, modules: Sequence[str], scale_with: Sequence[str]) -> str:
        weight = self._read(modules).float()
        return _int4_matrix(graph, name, weight, _block(weight.shape[1], name, INT4_BLOCKS))

    def _int4_awq(self, graph: GraphBuilder, name: str, modules: Sequence[str], scale_with: Sequence[str]) -> str:
        return _int4_matrix(graph, name, self._smoothed(modules), self.group_size or 128)


@dataclass(frozen=True)
class LinearForm:
    """How a form's weights are written.

    Attributes:
        weights: adds them, dequantized.
        smooths: a calibrated factor a channel moves between inputs and weights.
        in_blocks: ONNX Runtime keeps them as they are, in blocks along the inputs.
    """

    weights: Callable[[LinearWriter, GraphBuilder, str, Sequence[str], Sequence[str]], str]
    smooths: bool = False
    in_blocks: bool = False


LINEAR_FORMS: dict[str, LinearForm] = {
    "float": LinearForm(LinearWriter._float),
    "fp8": LinearForm(LinearWriter._fp8),
    "fp8_row": LinearForm(LinearWriter._fp8_row),
    "int8": LinearForm(LinearWriter._int8, in_blocks=True),
    "int8_row": LinearForm(LinearWriter._int8_row, smooths=True),
    "int4": LinearForm(LinearWriter._int4, in_blocks=True),
    "int4_awq": LinearForm(LinearWriter._int4_awq, smooths=True, in_blocks=True),
}
FLOAT = "float"  # the form of linears that stay as they are


def is_one_product(form: str, excluded: Sequence[bool]) -> bool:
    """Whether linears with the same input are stored as one: of smoothed ones, each has an input of its own.

    Args:
        excluded: of each, whether it stays in float.
    """
    return len(set(excluded)) == 1 and (excluded[0] or not LINEAR_FORMS[form].smooths)


def _per_output(graph: GraphBuilder, name: str, stored: torch.Tensor, scales: torch.Tensor) -> str:
    """[K, N] codes, [N] scales."""
    weight = graph.tensor(f"{name}.weight", stored)
    return graph.node("DequantizeLinear", [weight, graph.tensor(f"{name}.weight_scale", scales)], axis=1)


def _int4_matrix(graph: GraphBuilder, name: str, weight: torch.Tensor, block: int) -> str:
    """float32 [N, K] stored as [K, N] UINT4 around 8, in blocks along K; ONNX Runtime fuses it to MatMulNBits."""
    values = (codes.int4_groups(weight, block) + 8).to(torch.uint8)
    scales = codes.group_scales(weight, block)
    stored = graph.tensor(f"{name}.weight", values.T, nibbles=True)
    scale = graph.tensor(f"{name}.weight_scale", scales.T)
    zero = graph.tensor(f"{name}.weight_zero", torch.full(scales.T.shape, 8, dtype=torch.uint8), nibbles=True)
    return graph.node("DequantizeLinear", [stored, scale, zero], axis=0, block_size=block)


def int8_matrix(graph: GraphBuilder, name: str, weight: torch.Tensor) -> str:
    """[N, K] stored as [K, N] uint8 in blocks along K; ONNX Runtime fuses DequantizeLinear and MatMul into MatMulNBits.

    Args:
        graph: the graph that gets the nodes.
        name: prefix of the stored tensors.
        weight: float32 [N, K].
    """
    values, scales = quantize_int8_blocks(weight, name)
    stored = graph.tensor(f"{name}.weight", values.T)
    scale = graph.tensor(f"{name}.weight_scale", scales.T)
    zero = graph.tensor(f"{name}.weight_zero", torch.full(scales.T.shape, 128, dtype=torch.uint8))
    return graph.node("DequantizeLinear", [stored, scale, zero], axis=0, block_size=weight.shape[1] // scales.shape[1])


def _block(width: int, name: str, sizes: Sequence[int]) -> int:
    block = next((size for size in sizes if width % size == 0), None)
    if block is None:
        raise ConfigError(name, f"{width} input features", "a multiple of 16", "use --quant none or fp8")
    return block


def quantize_int8_blocks(weight: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric 8-bit blocks along the input dimension.

    Args:
        weight: [N, K].
        name: for the error message.

    Returns:
        uint8 values around the zero point 128, [N, K], and float32 scales, [N, K / block].
    """
    rows, width = weight.shape
    block = _block(width, name, INT8_BLOCKS)
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
