"""Vocabulary projections in 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from medusa_export.exporter.onnx.builder import GraphBuilder
from medusa_export.exporter.onnx.matrices import int8_matrix, int8_rows_matrix
from medusa_export.quantize.format_facts import INT8_BLOCKS, Codes, Reach
from medusa_export.quantize.formats import INT8_MAX

SMALLEST = 1e-12  # of a row's largest value, which is divided by


def project_blocks(graph: GraphBuilder, x: str, name: str, weight: torch.Tensor, output: str) -> None:
    """A product with 8-bit blocks, for which ONNX Runtime rounds the inputs as it likes.

    Args:
        graph: the graph that gets the nodes.
        x: name of the input value.  # float [..., K]
        name: prefix of the stored tensors.
        weight: any floating dtype.  # [N, K]
        output: name of the product.  # float [..., N]
    """
    graph.node("MatMul", [x, int8_matrix(graph, name, weight)], [output])


def project_integers(graph: GraphBuilder, x: str, name: str, weight: torch.Tensor, output: str) -> None:
    """A product of integers. Every row is rounded to codes of its own largest value: other rows do not change its numbers.

    Args:
        graph: the graph that gets the nodes.
        x: name of the input value.  # float [..., K]
        name: prefix of the stored tensors.
        weight: any floating dtype.  # [N, K]
        output: name of the product.  # float [..., N]
    """
    largest = graph.node("ReduceMax", [graph.node("Abs", [x]), graph.ints(-1)], keepdims=1)  # [..., 1]
    largest = graph.node("Max", [largest, graph.tensor("smallest", torch.tensor(SMALLEST))])
    scale = graph.tensor("unit_scale", torch.tensor(1 / INT8_MAX))
    zero = graph.tensor("int8_zero", torch.zeros((), dtype=torch.int8))
    rounded = graph.node("QuantizeLinear", [graph.node("Div", [x, largest]), scale, zero])
    product = graph.node(
        "MatMul", [graph.node("DequantizeLinear", [rounded, scale]), int8_rows_matrix(graph, name, weight)]
    )
    graph.node("Mul", [product, largest], [output])


@dataclass(frozen=True)
class Vocabulary:
    """How a vocabulary projection is written.

    Attributes:
        write: (graph, input, name, weight, output) adds the product.
        codes: what is stored.
    """

    write: Callable[[GraphBuilder, str, str, torch.Tensor, str], None]
    codes: Codes


BLOCKS = Vocabulary(project_blocks, Codes(8, Reach.GROUP, INT8_BLOCKS, zero_points=True))
INTEGERS = Vocabulary(project_integers, Codes(8, Reach.ROW))
