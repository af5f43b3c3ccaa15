"""What the products of a graph multiply with: chains of Cast, Transpose and DequantizeLinear over constants, undone by ONNX's rules.

No code is shared with what writes the graphs. A weight is known by its constant's name, which is the Hugging Face module's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from onnx import NodeProto, TensorProto

from medusa_export.core.errors import CheckpointError
from medusa_export.exporter.verify.dequantize import (
    FP4_ABSOLUTE,
    FP4_RELATIVE,
    FP4_VALUES,
    FP8_ABSOLUTE,
    FP8_RELATIVE,
    BoundedRows,
)
from medusa_export.exporter.verify.graphs.onnx_file import Constant, OnnxFile, attributes

FUSED = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}
FACTOR, OUTPUT_FACTOR = ".pre_quant_scale", ".output_factor"
_NAME = re.compile(r"(?P<module>.+?)(?:\+(?P<more>\d+))?(?:\.weight)+")


@dataclass(frozen=True)
class Scaling:
    """DequantizeLinear over a constant: (code - zero) * scale.

    Attributes:
        scale: as values.  # of block scales [K / block, N] or [N, K / block], of others [] or [size of the axis]
        axis, block: of the operator; block 0: none.
    """

    scale: torch.Tensor
    zero: int
    axis: int
    block: int


@dataclass(frozen=True)
class GraphWeight:
    """A matrix or vector of a graph under its Hugging Face name; a part of a fused one where ``first`` is not None.

    Attributes:
        transposed: the constant is [in, out].
        first: the first output that is this weight's.
        smoothing: factor of each input, which the product's other side was multiplied with.  # [in]
        rows_of: ids of the Hugging Face tensor's rows, for a vocabulary that was restricted.
    """

    name: str
    shape: tuple[int, ...]
    constant: Constant
    transposed: bool = False
    first: int = 0
    scaling: Scaling | None = None
    smoothing: torch.Tensor | None = None
    rows_of: torch.Tensor | None = None

    def row_numbers(self, start: int, stop: int) -> torch.Tensor | None:
        return None if self.rows_of is None else self.rows_of[start:stop]

    def rows(self, start: int, stop: int) -> BoundedRows:
        low, high = self.first + start, self.first + stop
        if len(self.shape) == 1:
            return BoundedRows(self.constant.matrix()[low:high])
        across = self.transposed
        codes = self.constant.columns(low, high).T.contiguous() if across else self.constant.matrix()[low:high]
        rows = BoundedRows(codes) if self.scaling is None else self._dequantized(codes, low, high)
        if self.smoothing is None:
            return rows
        factor = self.smoothing.to(torch.float32)
        absolute = None if rows.absolute is None else rows.absolute * factor.abs()
        epsilon = torch.finfo(self.smoothing.dtype).eps
        return BoundedRows(rows.values * factor, rows.relative + epsilon, absolute)

    def _dequantized(self, codes: torch.Tensor, low: int, high: int) -> BoundedRows:
        """[n, K] codes to values with what rounding may have done."""
        scaling, kind = self.scaling, self.constant.kind
        assert scaling is not None
        scale = self._scale(scaling, low, high, codes.shape[1])
        values, signed = _decoded(codes, kind)
        values = (values - (scaling.zero if signed else 0)) * scale
        if kind == TensorProto.FLOAT8E4M3FN:
            return BoundedRows(values, FP8_RELATIVE, scale * FP8_ABSOLUTE)
        if kind == TensorProto.FLOAT4E2M1:
            return BoundedRows(values, FP4_RELATIVE, scale * FP4_ABSOLUTE)
        return BoundedRows(values, torch.finfo(torch.float32).eps * 4, scale / 2)

    def _scale(self, scaling: Scaling, low: int, high: int, width: int) -> torch.Tensor:
        """Of every value or row.  # [] or [n, 1] or [n, K]"""
        scale = scaling.scale.to(torch.float32)
        if scale.dim() == 0 or scale.numel() == 1:
            return scale.reshape(())
        out_axis = 1 if self.transposed else 0
        if not scaling.block:
            return scale[low:high, None] if scaling.axis % 2 == out_axis else scale[None, :]
        by_row = (scale.T if self.transposed else scale)[low:high]  # [n, K / block]
        return by_row.repeat_interleave(scaling.block, dim=1)[:, :width]


def _decoded(codes: torch.Tensor, kind: int) -> tuple[torch.Tensor, bool]:
    """Codes as float32, and whether a zero point applies."""
    if kind == TensorProto.FLOAT4E2M1:
        magnitude = FP4_VALUES[(codes & 7).to(torch.int64)]
        return torch.where(codes >= 8, -magnitude, magnitude), False
    if kind == TensorProto.INT4:
        signed = codes.to(torch.int8)
        return torch.where(signed >= 8, signed - 16, signed).to(torch.float32), True
    return codes.to(torch.float32), True


def graph_weights(file: OnnxFile, draft_vocab: torch.Tensor | None = None) -> Iterator[GraphWeight]:
    """Every weight of a graph: of products, of Gather from the embedding, of norms, and biases.

    Args:
        draft_vocab: rows of vocabulary projections, where heads have some of them only.

    Raises:
        CheckpointError: a product with something else than a constant.
    """
    seen: set[str] = set()
    for node in file.graph.node:
        for weight in _of_node(file, node, draft_vocab):
            if weight.constant.name not in seen or weight.first:
                seen.add(weight.constant.name)
                yield weight


def _of_node(file: OnnxFile, node: NodeProto, draft_vocab: torch.Tensor | None) -> Iterator[GraphWeight]:
    if node.op_type in ("MatMul", "Gemm", "FusedMatMul"):
        found = _matrix(file, node.input[1], transposed=not attributes(node).get("transB", 0))
        if found is not None:
            smoothing = _smoothing(file, node.input[0])
            if smoothing is not None and len(smoothing) != found.shape[1]:
                got, expected = f"{len(smoothing)} smoothing factors before it", f"{found.shape[1]}, one an input"
                raise CheckpointError(f"{file.path}: {found.name}", got, expected, "export again")
            rows_of = draft_vocab if draft_vocab is not None and _is_vocabulary(found.constant.name) else None
            yield from _split(replace(found, smoothing=smoothing, rows_of=rows_of))
        if node.op_type == "Gemm" and len(node.input) > 2:
            yield from _vector(file, node.input[2])
    elif node.op_type == "Gather":
        found = _matrix(file, node.input[0], transposed=False)
        if found is not None and found.constant.name.startswith("model."):
            yield from _split(found)
    elif node.op_type == "Add":
        for name in node.input:
            yield from _vector(file, _without(file, name, OUTPUT_FACTOR))
    elif "Norm" in node.op_type:
        yield from _vector(file, _without(file, _norm_weight(node), FACTOR))


def _is_vocabulary(name: str) -> bool:
    return ".linear." not in name


def _matrix(file: OnnxFile, value: str, *, transposed: bool) -> GraphWeight | None:
    """What a value is made of; None where there is no constant behind it."""
    scaling: Scaling | None = None
    name = value
    while name not in file.initializers:
        node = file.producers.get(name)
        if node is None or node.op_type not in ("Cast", "Transpose", "DequantizeLinear"):
            return None
        if node.op_type == "Transpose":
            transposed = not transposed
        if node.op_type == "DequantizeLinear":
            scaling = _scaling(file, node)
        name = node.input[0]
    constant = file.constant(name)
    if len(constant.shape) != 2:
        return None
    shape = constant.shape[::-1] if transposed else constant.shape
    return GraphWeight(name, shape, constant, transposed, scaling=scaling)


def _scaling(file: OnnxFile, node: NodeProto) -> Scaling:
    given = attributes(node)
    zero = 0
    if len(node.input) > 2:
        zeros = file.value(node.input[2]).to(torch.float32)
        if bool((zeros != zeros.flatten()[0]).any()):
            raise CheckpointError(f"{file.path}: {node.input[2]}", "zero points that differ", "one", "export again")
        zero = int(zeros.flatten()[0])
    axis, block = given.get("axis", 1), given.get("block_size", 0)
    return Scaling(_number(file, node.input[1]), zero, axis, block)


def _number(file: OnnxFile, value: str) -> torch.Tensor:
    """Scales: constants, or constants with scales of their own (NVFP4)."""
    if value in file.initializers:
        return file.value(value).to(torch.float32)
    node = file.producers.get(value)
    if node is not None and (own := _without(file, value, OUTPUT_FACTOR)) != value:
        return _number(file, own)
    if node is None or node.op_type not in ("Cast", "DequantizeLinear"):
        raise CheckpointError(f"{file.path}: {value}", "a computed scale", "a constant one", "export again")
    inner = _number(file, node.input[0])
    return inner * _number(file, node.input[1]) if node.op_type == "DequantizeLinear" else inner


def _smoothing(file: OnnxFile, value: str) -> torch.Tensor | None:
    """The factors that an input was multiplied with, behind its rounding: by itself, in a norm's weight, or in up_proj's rows."""
    node = file.producers.get(value)
    while node is not None and node.op_type in ("QuantizeLinear", "DequantizeLinear", "Cast"):
        node = file.producers.get(node.input[0])
    if node is None:
        return None
    if "Norm" in node.op_type:
        node = file.producers.get(_norm_weight(node))
    if node is None or node.op_type != "Mul":
        return None
    names = _factors(file, node, FACTOR)
    return file.value(names[0]) if names else _of_outputs(file, node)


def _of_outputs(file: OnnxFile, node: NodeProto) -> torch.Tensor | None:
    """The factors in the scales of the product that one side of a Mul comes from."""
    for name in node.input:
        part, parts = 0, 1
        source = file.producers.get(name)
        if source is not None and source.op_type == "Split":
            part, parts = list(source.output).index(name), len(source.output)
            source = file.producers.get(source.input[0])
        if source is not None and source.op_type == "Add":
            source = next((file.producers[each] for each in source.input if each in file.producers), None)
        weight = file.producers.get(source.input[1]) if source is not None and source.op_type == "MatMul" else None
        scale = file.producers.get(weight.input[1]) if weight is not None and len(weight.input) > 1 else None
        found = _factors(file, scale, OUTPUT_FACTOR) if scale is not None and scale.op_type == "Mul" else []
        if found:
            factors = file.value(found[0]).chunk(parts)[part]
            if not bool((factors == 1).all()):  # gate_proj's
                return factors
    return None


def _norm_weight(node: NodeProto) -> str:
    return str(node.input[2 if node.op_type.startswith("Skip") else 1])


def _factors(file: OnnxFile, node: NodeProto, suffix: str) -> list[str]:
    return [name for name in node.input if name.endswith(suffix) and name in file.initializers]


def _without(file: OnnxFile, value: str, suffix: str) -> str:
    """The constant that a product of constants has beside a factor; any other value as it is."""
    node = file.producers.get(value)
    if node is None or node.op_type != "Mul" or not _factors(file, node, suffix):
        return value
    return next((str(name) for name in node.input if not name.endswith(suffix)), value)


def _vector(file: OnnxFile, name: str) -> Iterator[GraphWeight]:
    if name in file.initializers and len(file.initializers[name].dims) == 1:
        constant = file.constant(name)
        yield from _split(GraphWeight(name, constant.shape, constant))


def _split(weight: GraphWeight) -> Iterator[GraphWeight]:
    """A fused weight as the ones that it holds; each has a name, its rows are found when they are compared."""
    kind = "bias" if weight.constant.name.endswith(".bias") else "weight"
    base = weight.constant.name.removesuffix(".bias") + (".weight" if kind == "bias" else "")
    match = _NAME.fullmatch(base)
    if match is None:
        yield replace(weight, name=weight.constant.name)
        return
    owner, _, last = match["module"].rpartition(".")
    modules = FUSED.get(last, (last,))[: int(match["more"] or 0) + 1]
    if match["more"] is None:
        yield replace(weight, name=f"{match['module']}.{kind}")
        return
    yield from (replace(weight, name=f"{owner}.{module}.{kind}", first=-1) for module in modules)


def placed(weights: Iterator[GraphWeight], shape_of: Any) -> Iterator[GraphWeight]:
    """Parts of fused weights with their rows, one below the other, as many as the Hugging Face tensor has.

    Args:
        shape_of: name -> shape.
    """
    first: dict[str, int] = {}
    for weight in weights:
        if weight.first >= 0:
            yield weight
            continue
        at, height = first.get(weight.constant.name, 0), shape_of(weight.name)[0]
        first[weight.constant.name] = at + height
        if at + height > weight.shape[0]:
            raise CheckpointError(
                weight.constant.name, f"{weight.shape[0]} rows", f"at least {at + height}", "export again"
            )
        yield replace(weight, first=at, shape=(height, *weight.shape[1:]))
