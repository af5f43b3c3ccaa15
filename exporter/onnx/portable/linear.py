"""Linears of the portable graph: weights in the engine's 16-bit dtype, or standard Q/DQ in forms that TensorRT has kernels for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from onnx import TensorProto

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.onnx.builder import GraphBuilder
from medusa_export.exporter.onnx.linear import FLOAT
from medusa_export.exporter.onnx.matrices import block_of
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.quantize import numerics as codes
from medusa_export.quantize.format_facts import INT4_BLOCKS
from medusa_export.quantize.formats import FP4_MAX, FP8_MAX, INT4_MAX, INT8_MAX
from medusa_export.quantize.numerics import code_scale, fused_amax, quantize_fp8
from medusa_export.quantize.scales import Scales

ONNX_DTYPE: dict[torch.dtype, int] = {
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float32: TensorProto.FLOAT,
}
OPSETS = {"": 24}
FP4_BLOCK = 16
TENSORRT = "trt"  # the domain of the one operator that is not ONNX's: NVFP4's rounding of activations, whose scales are dynamic


@dataclass(frozen=True)
class PortableLinear:
    """Adds ``x @ W.T + b`` for one linear or several fused ones (same input, outputs concatenated).

    Weights keep the rules of the TensorRT-LLM checkpoint. Scales are in ``dtype``, as TensorRT wants them, rounded up so that nothing
    saturates; the codes belong to the rounded scale.

    Attributes:
        form: key of ``PORTABLE_FORMS``.
        dtype: of activations, scales, and weights that are not quantized.
        scales: calibrated scales; needed by the forms with activations and by those that are smoothed.
        group_size: inputs that share a scale; needed by "int4_awq".
        excluded: whether a module stays in ``dtype``.
    """

    checkpoint: MedusaCheckpoint
    form: str
    dtype: torch.dtype
    scales: Scales | None = None
    group_size: int | None = None
    excluded: Callable[[str], bool] = lambda module: False

    def __call__(self, graph: GraphBuilder, x: str, modules: Sequence[str], *, scale_with: Sequence[str] = ()) -> str:
        """Add the product.  # x [..., K] -> [..., sum of N]

        Args:
            x: name of the input value.
            modules: Hugging Face module names, fused in this order.
            scale_with: further modules that share the scales a tensor (gate_proj and up_proj, which TensorRT-LLM fuses).
        """
        name = modules[0] if len(modules) == 1 else f"{modules[0]}+{len(modules) - 1}"
        form = PORTABLE_FORMS[FLOAT if self.excluded(modules[0]) else self.form]
        fused = modules if form.smooths else [*modules, *scale_with]
        weight = torch.cat([self.checkpoint.read(f"{module}.weight") for module in modules])  # [N, K]
        if form.smooths:
            smoothing = self._required_scales().pre_quant_scale[modules[0]]  # fused modules share it
            x = graph.node("Mul", [x, graph.tensor(f"{name}.pre_quant_scale", smoothing.to(self.dtype))])
            weight = weight.float() / smoothing
        if form.activations:
            x = form.activations(self, graph, x, name, fused)
        out = graph.node("MatMul", [x, form.weights(self, graph, name, weight, fused)])
        bias = [f"{module}.bias" for module in modules]
        if bias[0] not in self.checkpoint.config.tensor_shapes():
            return out
        return graph.node(
            "Add", [out, self.tensor(graph, f"{name}.bias", torch.cat(list(map(self.checkpoint.read, bias))))]
        )

    @property
    def opsets(self) -> dict[str, int]:
        """Of a graph with these linears: ONNX's, and TensorRT's domain where its operator is needed."""
        return OPSETS | ({TENSORRT: 1} if PORTABLE_FORMS[self.form].foreign else {})

    def matrix(self, graph: GraphBuilder, name: str) -> str:
        """A tensor of the checkpoint that is never quantized, in ``dtype``."""
        return self.tensor(graph, name, self.checkpoint.read(name))

    def tensor(self, graph: GraphBuilder, name: str, value: torch.Tensor) -> str:
        """A constant in ``dtype``.

        Args:
            graph: the graph that stores it.
            name: of the constant.
            value: any floating dtype.
        """
        return graph.tensor(name, value.to(self.dtype))

    def rounded(self, scale: torch.Tensor | float) -> torch.Tensor:
        """A scale in ``dtype``, never below what it was."""
        exact = torch.as_tensor(scale, dtype=torch.float32)
        near = exact.to(self.dtype)
        if self.dtype == torch.float32:
            return near
        above = (near.view(torch.int16) + 1).view(
            self.dtype
        )  # the next number: positive floats are ordered like integers
        return torch.where(near.float() < exact, above, near)

    def _required_scales(self) -> Scales:
        if self.scales is None:
            raise ConfigError(self.form, "no calibrated scales", "scales from calibration", "calibrate before writing")
        return self.scales

    def _amax(self, kind: str, modules: Sequence[str]) -> float:
        return fused_amax(getattr(self._required_scales(), kind), modules)


def _fake_quantize(bound: float, dtype: torch.dtype) -> Callable[..., str]:
    """The input rounded to ``dtype`` with its calibrated scale, and back: what TensorRT makes a quantized product of."""

    def add(linear: PortableLinear, graph: GraphBuilder, x: str, name: str, modules: Sequence[str]) -> str:
        scale = linear.rounded(code_scale(linear._amax("input_amax", modules), bound))
        pair = [
            graph.tensor(f"{name}.input_scale", scale),
            graph.tensor(f"{str(dtype)[6:]}_zero", torch.zeros((), dtype=dtype)),
        ]
        return graph.node("DequantizeLinear", [graph.node("QuantizeLinear", [x, *pair]), *pair])

    return add


def _fp4_activations(linear: PortableLinear, graph: GraphBuilder, x: str, name: str, modules: Sequence[str]) -> str:
    """Blocks of 16 inputs under an FP8 scale that depends on them, in units of the calibrated one."""
    scale = torch.tensor(code_scale(linear._amax("input_amax", modules), FP4_MAX * FP8_MAX))
    whole = graph.tensor(f"{name}.input_scale", scale)
    attributes: dict[str, Any] = {"axis": -1, "block_size": FP4_BLOCK}
    values, blocks = graph.node(
        "TRT_FP4DynamicQuantize", [x, whole], 2, domain=TENSORRT, scale_type=TensorProto.FLOAT8E4M3FN, **attributes
    )
    block_scales = graph.node("DequantizeLinear", [blocks, whole])
    block_scales = graph.node("Cast", [block_scales], to=ONNX_DTYPE[linear.dtype])
    return graph.node("DequantizeLinear", [values, block_scales], **attributes)


def _float(linear: PortableLinear, graph: GraphBuilder, name: str, weight: torch.Tensor, modules: Sequence[str]) -> str:
    return linear.tensor(graph, f"{name}.weight", weight.T)


def _fp8(linear: PortableLinear, graph: GraphBuilder, name: str, weight: torch.Tensor, modules: Sequence[str]) -> str:
    """[K, N] float8_e4m3fn under one scale, the largest of all modules that TensorRT-LLM fuses with these."""
    scale = linear.rounded(code_scale(linear._amax("weight_amax", modules), FP8_MAX))
    return _scaled(graph, name, _fp8_codes(weight, scale.float()), scale)


def _fp8_row(
    linear: PortableLinear, graph: GraphBuilder, name: str, weight: torch.Tensor, modules: Sequence[str]
) -> str:
    """[K, N] float8_e4m3fn with a scale an output."""
    scales = linear.rounded(codes.row_scales(weight.float(), FP8_MAX))
    return _scaled(graph, name, _fp8_codes(weight, scales.float()[:, None]), scales, axis=1)


def _int8_row(
    linear: PortableLinear, graph: GraphBuilder, name: str, weight: torch.Tensor, modules: Sequence[str]
) -> str:
    """[K, N] int8 with a scale an output."""
    scales = linear.rounded(codes.row_scales(weight.float(), INT8_MAX))
    return _scaled(graph, name, codes.int8_rows(weight.float(), scales.float()).T, scales, axis=1)


def _int4(linear: PortableLinear, graph: GraphBuilder, name: str, weight: torch.Tensor, modules: Sequence[str]) -> str:
    """[K, N] INT4 in blocks along K."""
    block = linear.group_size or block_of(weight.shape[1], name, INT4_BLOCKS)
    scales = linear.rounded(codes.group_scales(weight.float(), block))
    values = (
        (weight.float().unflatten(1, (-1, block)) / scales.float()[..., None]).round_().clamp_(-INT4_MAX - 1, INT4_MAX)
    )
    nibbles = values.flatten(1).T.to(torch.int8).view(torch.uint8) & 0x0F
    stored = graph.tensor(f"{name}.weight", nibbles, nibbles=True, nibble_type=TensorProto.INT4)
    scale = graph.tensor(f"{name}.weight_scale", scales.T)
    return graph.node("DequantizeLinear", [stored, scale], axis=0, block_size=block)


def _fp4(linear: PortableLinear, graph: GraphBuilder, name: str, weight: torch.Tensor, modules: Sequence[str]) -> str:
    """[N, K] FLOAT4E2M1 in blocks of 16 along K, their scales in FP8, in units of one float32."""
    whole = code_scale(linear._amax("weight_amax", modules), FP4_MAX * FP8_MAX)
    packed = codes.fp4_blocks(weight.float(), whole, FP4_BLOCK)  # [N, K / 2]
    values = torch.stack([packed & 0x0F, packed >> 4], dim=-1).reshape(weight.shape)
    stored = graph.tensor(f"{name}.weight", values, nibbles=True, nibble_type=TensorProto.FLOAT4E2M1)
    blocks = graph.tensor(f"{name}.weight_scale", codes.fp4_block_scales(weight.float(), whole, FP4_BLOCK))
    scale = graph.node("DequantizeLinear", [blocks, graph.tensor(f"{name}.weight_scale_2", torch.tensor(whole))])
    scale = graph.node("Cast", [scale], to=ONNX_DTYPE[linear.dtype])
    dequantized = graph.node("DequantizeLinear", [stored, scale], axis=-1, block_size=FP4_BLOCK)
    return graph.node("Transpose", [dequantized], perm=[1, 0])


def _fp8_codes(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[N, K] -> float8_e4m3fn [K, N]"""
    return quantize_fp8(weight, scale).view(torch.uint8).T.contiguous().view(torch.float8_e4m3fn)


def _scaled(graph: GraphBuilder, name: str, stored: torch.Tensor, scale: torch.Tensor, **attributes: Any) -> str:
    pair = [graph.tensor(f"{name}.weight", stored), graph.tensor(f"{name}.weight_scale", scale)]
    return graph.node("DequantizeLinear", pair, **attributes)


@dataclass(frozen=True)
class PortableForm:
    """How a form's weights and inputs are written.

    Attributes:
        smooths: a calibrated factor a channel moves between them.
        foreign: there is an operator that is not ONNX's.
    """

    weights: Callable[..., str]
    activations: Callable[..., str] | None = None
    smooths: bool = False
    foreign: bool = False


_TO_FP8, _TO_INT8 = _fake_quantize(FP8_MAX, torch.float8_e4m3fn), _fake_quantize(INT8_MAX, torch.int8)
PORTABLE_FORMS: dict[str, PortableForm] = {
    "float": PortableForm(_float),
    "fp8": PortableForm(_fp8, _TO_FP8),
    "fp8_row": PortableForm(_fp8_row),
    "int8_sq": PortableForm(_int8_row, _TO_INT8, smooths=True),
    "int8": PortableForm(_int8_row),
    "int4": PortableForm(_int4),
    "int4_awq": PortableForm(_int4, smooths=True),
    "nvfp4": PortableForm(_fp4, _fp4_activations, foreign=True),
}
