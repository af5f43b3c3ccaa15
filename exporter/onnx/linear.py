"""How a linear's weights are stored in ONNX: float, integer blocks, or the very codes of the TensorRT-LLM checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from onnx import TensorProto

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.onnx.builder import GraphBuilder
from medusa_export.exporter.onnx.matrices import block_of, int4_matrix, int8_matrix, per_output
from medusa_export.exporter.onnx.vocabulary import BLOCKS, INTEGERS, Vocabulary
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.quantize import numerics as codes
from medusa_export.quantize.format_facts import INT4_BLOCKS
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

    def __call__(
        self,
        graph: GraphBuilder,
        x: str,
        modules: Sequence[str],
        *,
        scale_with: Sequence[str] = (),
        smoothed: bool = False,
    ) -> str:
        """Add the product.  # x [..., K] -> [..., sum of N]

        Args:
            x: name of the input value.
            modules: Hugging Face module names, fused in this order.
            scale_with: further modules that share the FP8 scales (gate_proj and up_proj, which TensorRT-LLM fuses).
            smoothed: what gives x has multiplied it with the smoothing factors already, see :meth:`folds`.
        """
        name = fused_name(modules)
        is_float = self.excluded(modules[0])
        form = FLOAT if is_float else self.form
        smooths = LINEAR_FORMS[form].smooths
        if smooths and not smoothed:
            x = graph.node("Mul", [x, self.factor(graph, modules)])
        weight = LINEAR_FORMS[form].weights(self, graph, name, modules, scale_with)
        if self.activations is not None and not is_float:
            x = self._fake_quantize(graph, x, name, modules if smooths else [*modules, *scale_with])
        out = graph.node("MatMul", [x, weight])
        bias = self._bias(modules)
        if bias is None:
            return str(out)
        stored, factor = graph.tensor(f"{name}.bias", bias), self._output_factor(graph, modules)
        return str(graph.node("Add", [out, graph.node("Mul", [stored, factor]) if factor else stored]))

    def takes_as_one(self, modules: Sequence[str]) -> bool:
        """Whether a product of several modules is the same as theirs, side by side."""
        return is_one_product(self.form, [self.excluded(module) for module in modules])

    def folds(self, modules: Sequence[str]) -> bool:
        """Whether the linears that take a value get it multiplied with their smoothing factors by what makes it."""
        return LINEAR_FORMS[self.form].integers and not any(map(self.excluded, modules))

    def smooths_up(self, down: str, up: str) -> bool:
        """Whether up_proj's outputs come multiplied with the smoothing factors of down_proj."""
        return LINEAR_FORMS[self.form].integers and not self.excluded(up) and not self.excluded(down)

    @property
    def vocabulary(self) -> Vocabulary | None:
        """What writes vocabulary projections; None: they stay in the checkpoint's numbers."""
        return LINEAR_FORMS[self.form].vocabulary

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
        """The factor of every input; modules that are one product share it.  # [K]"""
        factors = self._required_scales().pre_quant_scale
        first = factors[modules[0]]
        for module in modules[1:]:
            if not torch.equal(factors[module], first):
                expected = f"those of {modules[0]}, which has the same input"
                raise ConfigError(f"pre_quant_scale of {module}", "other factors", expected, "calibrate again")
        return first

    def factor(self, graph: GraphBuilder, modules: Sequence[str]) -> str:
        """The smoothing factors of linears that are one product, as a constant.  # [K]"""
        return graph.tensor(f"{fused_name(modules)}.pre_quant_scale", self._smoothing(modules))

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
        return per_output(graph, name, stored, scales)

    def _int8_row(self, graph: GraphBuilder, name: str, modules: Sequence[str], scale_with: Sequence[str]) -> str:
        """[K, N] int8 with a scale an output, smoothed.

        The outputs that are multiplied with a later linear's smoothing factors get them through their scales.
        """
        weight = self._smoothed(modules)
        scales = codes.row_scales(weight, INT8_MAX)
        return per_output(graph, name, codes.int8_rows(weight, scales).T, scales, self._output_factor(graph, modules))

    def _output_factor(self, graph: GraphBuilder, modules: Sequence[str]) -> str | None:
        """Smoothing factors of down_proj in the rows of up_proj, 1 in those of gate_proj; see :meth:`smooths_up`."""
        last = modules[-1]
        if not last.endswith(UP) or not self.smooths_up(down := last.removesuffix(UP) + DOWN, last):
            return None
        shapes = self.checkpoint.config.tensor_shapes()
        height = sum(shapes[f"{module}.weight"][0] for module in modules[:-1])
        factor = torch.cat([torch.ones(height), self._smoothing([down])])
        return graph.tensor(f"{fused_name(modules)}.output_factor", factor)

    def _int8(self, graph: GraphBuilder, name: str, modules: Sequence[str], scale_with: Sequence[str]) -> str:
        return int8_matrix(graph, name, self._read(modules))

    def _int4(self, graph: GraphBuilder, name: str, modules: Sequence[str], scale_with: Sequence[str]) -> str:
        weight = self._read(modules).float()
        return int4_matrix(graph, name, weight, block_of(weight.shape[1], name, INT4_BLOCKS))

    def _int4_awq(self, graph: GraphBuilder, name: str, modules: Sequence[str], scale_with: Sequence[str]) -> str:
        return int4_matrix(graph, name, self._smoothed(modules), self.group_size or 128)


@dataclass(frozen=True)
class LinearForm:
    """How a form's weights are written.

    Attributes:
        weights: adds them, dequantized.
        smooths: a calibrated factor a channel moves between inputs and weights.
        vocabulary: writes the vocabulary projection in 8 bits too, where ONNX Runtime keeps the codes: half of a small model's bytes
            are in it. None: ONNX Runtime makes float32 of all weights.
        integers: inputs are rounded with the calibrated scale and products are of integers, which are exact: how many rows a product
            has does not change a row's numbers. Smoothing is folded into what makes the inputs.
    """

    weights: Callable[[LinearWriter, GraphBuilder, str, Sequence[str], Sequence[str]], str]
    smooths: bool = False
    vocabulary: Vocabulary | None = None
    integers: bool = False

    @property
    def keeps_codes(self) -> bool:
        """Whether ONNX Runtime keeps the weights as they are; it makes float32 of the others."""
        return self.vocabulary is not None


LINEAR_FORMS: dict[str, LinearForm] = {
    "float": LinearForm(LinearWriter._float),
    "fp8": LinearForm(LinearWriter._fp8),
    "fp8_row": LinearForm(LinearWriter._fp8_row),
    "int8": LinearForm(LinearWriter._int8, vocabulary=BLOCKS),
    "int8_row": LinearForm(LinearWriter._int8_row, smooths=True, vocabulary=INTEGERS, integers=True),
    "int4": LinearForm(LinearWriter._int4, vocabulary=BLOCKS),
    "int4_awq": LinearForm(LinearWriter._int4_awq, smooths=True, vocabulary=BLOCKS),
}
FLOAT = "float"  # the form of linears that stay as they are
UP, DOWN = "up_proj", "down_proj"


def is_one_product(form: str, excluded: Sequence[bool]) -> bool:
    """Whether linears with the same input are stored as one: of smoothed ones, each has an input of its own, unless that is folded.

    Args:
        excluded: of each, whether it stays in float.
    """
    row = LINEAR_FORMS[form]
    return len(set(excluded)) == 1 and (excluded[0] or not row.smooths or row.integers)


def fused_name(modules: Sequence[str]) -> str:
    """What the constants of several linears, fused, are named after."""
    return modules[0] if len(modules) == 1 else f"{modules[0]}+{len(modules) - 1}"
