"""A thin ONNX graph builder that streams initializers to one external data file: a tensor is in memory only while it is written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper

OPSET = 23
IR_VERSION = 11
MICROSOFT = "com.microsoft"
ALIGNMENT = 4096  # page aligned, so that a runtime can map the file
INLINE_BYTES = 1024

_ONNX_DTYPE: dict[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
}


class ExternalData:
    """One file of initializers, each written once and kept only as its place; several graphs may share it.

    Use as a context manager around the graphs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.protos: dict[str, onnx.TensorProto] = {}

    @classmethod
    def stored(cls, path: Path, protos: Iterable[onnx.TensorProto]) -> ExternalData:
        """Tensors that are in a file already; only small ones, which stay inline, can be added."""
        data = cls(path)
        data.protos = {proto.name: proto for proto in protos}
        return data

    def __enter__(self) -> ExternalData:
        self._file = self.path.open("wb")
        return self

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        self._file.close()

    def add(
        self, name: str, value: torch.Tensor, *, nibbles: bool = False, nibble_type: int = TensorProto.UINT4
    ) -> onnx.TensorProto:
        """Write a tensor, unless one of that name is there already; small ones stay inline.

        Args:
            nibbles: the values are 0 .. 15 in uint8 and are stored two a byte.
            nibble_type: what those 4 bits are: UINT4, INT4 or FLOAT4E2M1.
        """
        if name in self.protos:
            return self.protos[name]
        flat = value.detach().contiguous().reshape(-1)
        raw = (flat[0::2] | flat[1::2] << 4 if nibbles else flat).view(torch.uint8).numpy()  # [bytes]
        data_type = nibble_type if nibbles else _ONNX_DTYPE[value.dtype]
        proto = TensorProto(name=name, data_type=data_type, dims=list(value.shape))
        if raw.nbytes <= INLINE_BYTES:
            proto.raw_data = raw.tobytes()
        else:
            self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
            proto.data_location = TensorProto.EXTERNAL
            place = {"location": self.path.name, "offset": self._file.tell(), "length": raw.nbytes}
            for key, text in place.items():
                proto.external_data.add(key=key, value=str(text))
            self._file.write(raw.data)
        self.protos[name] = proto
        return proto


class GraphBuilder:
    """Collects nodes, inputs and outputs; writes ``path`` on a clean exit, and initializers at once.

    Args:
        path: the model file.
        name: the graph's name.
        data: an open file of initializers to share; None opens ``path`` + ".data" for this graph alone.
        opsets: domain -> version; only operators of these are in the graph.
    """

    def __init__(
        self, path: Path, name: str, data: ExternalData | None = None, opsets: dict[str, int] | None = None
    ) -> None:
        self.path, self.name, self.opsets = path, name, opsets or {"": OPSET, MICROSOFT: 1}
        self._data = ExternalData(path.with_name(path.name + ".data")) if data is None else data
        self._owned = self._data if data is None else None
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._counter = 0

    @classmethod
    def beside(cls, path: Path, source: onnx.GraphProto) -> GraphBuilder:
        """A graph from parts of another one in the same directory, on the weights that were stored with that."""
        graph = cls(path, source.name, ExternalData.stored(path, source.initializer))
        graph._counter = len(source.node)  # names of new values are none of the source's
        return graph

    def __enter__(self) -> GraphBuilder:
        if self._owned:
            self._owned.__enter__()
        return self

    def __exit__(self, kind: object, value: object, traceback: object) -> None:
        if self._owned:
            self._owned.__exit__(kind, value, traceback)
        if kind is None:
            self._save()

    def input(self, name: str, dtype: int, shape: list[int | str]) -> str:
        """Declare a graph input; strings in ``shape`` are symbolic dimensions.

        Args:
            name: of the input.
            dtype: an ``onnx.TensorProto`` element type.
            shape: sizes; strings are symbolic dimensions.
        """
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: int, shape: list[int | str]) -> str:
        """Declare a graph output.

        Args:
            name: of a node's output.
            dtype: an ``onnx.TensorProto`` element type.
            shape: sizes; strings are symbolic dimensions.
        """
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def node(
        self, op: str, inputs: list[str], outputs: int | list[str] = 1, domain: str = "", **attributes: Any
    ) -> Any:
        """Add a node. Returns the output name, or the list of names when there are several.

        Args:
            op: operator type.
            inputs: names; an empty one leaves an optional input out.
            outputs: names, or how many to make up.
            domain: of the operator; empty is ONNX's own.
            attributes: of the operator.
        """
        if isinstance(outputs, int):
            self._counter += 1
            outputs = [f"{op}_{self._counter}" + (f"_{i}" if i else "") for i in range(outputs)]
        self._nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs[0] if len(outputs) == 1 else outputs

    def take(self, node: onnx.NodeProto) -> None:
        """Add a node of another graph, and the stored tensors that it reads."""
        self._nodes.append(node)
        for name in node.input:
            if name in self._data.protos:
                self.stored(name)

    def stored(self, name: str) -> str:
        """A tensor that the data holds already."""
        self._initializers[name] = self._data.protos[name]
        return name

    def take_output(self, output: onnx.ValueInfoProto) -> None:
        """Declare an output of another graph."""
        self._outputs.append(output)

    def tensor(self, name: str, value: torch.Tensor, **nibbles: Any) -> str:
        """Store an initializer under a unique name; the first value given to a name stays. For ``nibbles`` see ExternalData.

        Args:
            name: of the initializer.
            value: its values; copied into the data file.
            nibbles: see :meth:`ExternalData.add`.
        """
        if name not in self._initializers:
            self._initializers[name] = self._data.add(name, value, **nibbles)
        return name

    def ints(self, *values: int) -> str:
        """A shared int64 vector constant."""
        return self.tensor("int64_" + "_".join(map(str, values)), torch.tensor(values, dtype=torch.int64))

    def _save(self) -> None:
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, initializer=list(self._initializers.values())
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="medusa-export")
        self.path.write_bytes(model.SerializeToString(deterministic=True))


def first_columns(graph: GraphBuilder, x: str, width: int, count: int | None) -> str:
    """The first ``count`` of a matrix's ``width`` columns; all of them for None.

    Args:
        graph: takes the node.
        x: name of the matrix.  # [..., width]
        width: its columns.
        count: columns to keep; None: all.
    """
    if count in (None, width):
        return x
    first: str = graph.node("Split", [x, graph.ints(count, width - count)], 2, axis=-1)[0]
    return first


def silu(graph: GraphBuilder, x: str) -> str:
    """x * sigmoid(x), as the one fused operator that ONNX Runtime has for it."""
    return graph.node("QuickGelu", [x], domain=MICROSOFT, alpha=1.0)
