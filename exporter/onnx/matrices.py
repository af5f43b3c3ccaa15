"""Matrices of quantized weights in ONNX: codes with a scale an output, and in blocks along the inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.onnx.builder import GraphBuilder
from medusa_export.heads.checkpoint.tensor_source import row_chunks
from medusa_export.quantize import numerics as codes
from medusa_export.quantize.format_facts import INT8_BLOCKS
from medusa_export.quantize.formats import INT8_MAX


def per_output(
    graph: GraphBuilder, name: str, stored: torch.Tensor, scales: torch.Tensor, factor: str | None = None
) -> str:
    """A matrix with a scale an output.

    Args:
        graph: the graph that gets the nodes.
        name: prefix of the stored tensors.
        stored: codes.  # [K, N]
        scales: of every output.  # float32 [N]
        factor: constant that the outputs are multiplied with besides.  # [N]
    """
    weight, scale = graph.tensor(f"{name}.weight", stored), graph.tensor(f"{name}.weight_scale", scales)
    if factor is not None:
        scale = graph.node(
            "Mul", [scale, factor]
        )  # of constants: ONNX Runtime multiplies once, when the session is made
    return str(graph.node("DequantizeLinear", [weight, scale], axis=1))


def int4_matrix(graph: GraphBuilder, name: str, weight: torch.Tensor, block: int) -> str:
    """float32 [N, K] stored as [K, N] UINT4 around 8, in blocks along K; ONNX Runtime fuses it to MatMulNBits.

    Args:
        graph: the graph that gets the nodes.
        name: prefix of the stored tensors.
        weight: float32 [N, K].
        block: inputs that share a scale; divides K.
    """
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


def block_of(width: int, name: str, sizes: Sequence[int]) -> int:
    """The first size that divides the inputs.

    Args:
        width: inputs.
        name: for the error message.
        sizes: of blocks.

    Raises:
        ConfigError: none does.
    """
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
    block = block_of(width, name, INT8_BLOCKS)
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


def int8_rows_matrix(graph: GraphBuilder, name: str, weight: torch.Tensor) -> str:
    """[N, K] stored as [K, N] int8 with a scale an output; with rounded inputs a product of integers.

    Args:
        graph: the graph that gets the nodes.
        name: prefix of the stored tensors.
        weight: any floating dtype.  # [N, K]
    """
    stored, scales = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight))
    start = 0
    for part in row_chunks(weight):
        rows = part.float()
        scale = codes.row_scales(rows, INT8_MAX)
        stored[start : start + len(part)], scales[start : start + len(part)] = codes.int8_rows(rows, scale), scale
        start += len(part)
    return per_output(graph, name, stored.T, scales)
