"""Portable graphs where ONNX Runtime's CPU kernels end, made runnable: bfloat16 as float32, FP4 and its rounding as arithmetic.

Nothing else is changed: float16, FP8, INT8 and INT4 graphs run as they are, file and all. bfloat16 values are float32 values, so only
the rounding between the operators is lost. NVFP4's operator of TensorRT, TRT_FP4DynamicQuantize, is spelled out after NVIDIA's
description of it ("Dynamic Double Quantization"): a block's scale is its largest magnitude / 6, in FP8 units of the given scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

TENSORRT = "trt"
FP4_MAX, BLOCK = 6.0, 16


def lifted(path: Path) -> tuple[bytes, dict[str, Any]] | None:
    """The graph and its large tensors for ONNX Runtime's CPU kernels; None where the file can be opened as it is.

    Returns:
        the model, and float32 arrays by name, to be given as external initializers.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    foreign = (onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT4E2M1)
    if not any(tensor.data_type in foreign for tensor in model.graph.initializer):
        return None
    onnx.load_external_data_for_model(model, str(path.parent))
    arrays: dict[str, Any] = {}
    fp4 = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT4E2M1}
    for tensor in model.graph.initializer:
        if tensor.data_type in foreign:
            _replace(tensor, onnx.numpy_helper.to_array(tensor).astype(np.float32), arrays)
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    nodes = [new for node in model.graph.node for new in _nodes(node, fp4)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    kept = [opset for opset in model.opset_import if opset.domain != TENSORRT]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return model.SerializeToString(), arrays


def _replace(tensor: Any, values: Any, arrays: dict[str, Any]) -> None:
    """float32 instead of what a tensor holds; ONNX Runtime takes only what lies outside of the model as external."""
    import onnx

    name = tensor.name
    if values.nbytes < 1024:
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
        return
    arrays[name] = values
    tensor.CopyFrom(onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=values.shape))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="given.data")


def _nodes(node: Any, fp4: set[str]) -> Iterator[Any]:
    """What takes the place of a node; ``fp4`` grows by the values that are FP4 numbers."""
    import onnx

    if node.domain == TENSORRT:
        fp4.add(node.output[0])
        yield from _dynamic_quantize(node)
    elif node.op_type == "DequantizeLinear" and node.input[0] in fp4:
        yield from _dequantize_blocks(node)
    else:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == onnx.TensorProto.BFLOAT16:
                attribute.i = onnx.TensorProto.FLOAT
        yield node


def _adder(prefix: str) -> tuple[list[Any], Callable[..., str]]:
    """A list of nodes, and what adds one to it and gives its output's name."""
    import onnx

    nodes: list[Any] = []

    def add(op: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"{prefix}.{len(nodes)}"
        nodes.append(onnx.helper.make_node(op, list(inputs), [output], **attributes))
        return output

    return nodes, add


def _constant(add: Callable[..., str], value: Any) -> str:
    import onnx

    return add("Constant", value=onnx.numpy_helper.from_array(np.asarray(value)))


def _dynamic_quantize(node: Any) -> list[Any]:
    """x [..., K] -> FP4 numbers as float32 [..., K], and the scale of every block as float8_e4m3fn [..., K / 16]."""
    import onnx

    nodes, add = _adder(f"{node.name}.lifted")
    x = add("Cast", node.input[0], to=onnx.TensorProto.FLOAT)
    shape = add("Shape", x)
    blocks = add("Reshape", x, add("Concat", add("Shape", x, end=-1), _constant(add, np.array([-1, BLOCK])), axis=0))
    largest = add("ReduceMax", add("Abs", blocks), _constant(add, np.array([-1])), keepdims=0)
    wanted = add("Div", largest, add("Mul", node.input[1], _constant(add, np.float32(FP4_MAX))))
    scale = add("Cast", wanted, output=node.output[1], to=onnx.TensorProto.FLOAT8E4M3FN)
    unit = add("Mul", add("Cast", scale, to=onnx.TensorProto.FLOAT), node.input[1])
    unit = add("Max", unit, _constant(add, np.float32(1e-30)))  # blocks of zeros
    value = add("Div", blocks, add("Unsqueeze", unit, _constant(add, np.array([-1]))))
    size = add("Min", add("Abs", value), _constant(add, np.float32(FP4_MAX)))
    half, two, four = (_constant(add, np.float32(number)) for number in (0.5, 2, 4))
    fine = add(
        "Mul", add("Round", add("Mul", size, two)), half
    )  # to halves below 2, whole numbers below 4, even ones above
    coarse = add("Mul", add("Round", add("Mul", size, half)), two)
    rounded = add("Where", add("Less", size, four), add("Round", size), coarse)
    rounded = add("Where", add("Less", size, two), fine, rounded)
    add("Reshape", add("Mul", rounded, add("Sign", value)), shape, output=node.output[0])
    return nodes


def _dequantize_blocks(node: Any) -> list[Any]:
    """FP4 numbers [..., K] times the scale of their block [..., K / 16], in the scales' dtype."""
    import onnx

    nodes, add = _adder(f"{node.name}.lifted")
    values, scale = node.input[0], node.input[1]
    shape = add("Concat", add("Shape", scale), _constant(add, np.array([BLOCK])), axis=0)
    unit = add("Cast", scale, to=onnx.TensorProto.FLOAT)
    product = add("Mul", add("Reshape", values, shape), add("Unsqueeze", unit, _constant(add, np.array([-1]))))
    add("CastLike", add("Reshape", product, add("Shape", values)), scale, output=node.output[0])
    return nodes
