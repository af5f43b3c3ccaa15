"""PyTorch in the place of TensorRT: runs the very graphs that TensorRT was given, on the same buffers, on a GPU or a CPU.

On a GPU every repeated run is a CUDA graph, and FP8 products are the GPU's own. So the runtime above it and the graphs can be tried
on GPUs that have no TensorRT here; operators are not fused, and speeds are no promise for TensorRT's.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medusa_export.core.errors import ConfigError
from medusa_export.engines.tensorrt.build import DECODER_ENGINE, GRAPHS, BuildRequest, Progress
from medusa_export.engines.tensorrt.device import Buffers, CudaStream, Run
from medusa_export.engines.tensorrt.emulation.torch_operators import Shared, dequantize, operators

if TYPE_CHECKING:
    import torch

FP8_TILE = 16  # cuBLAS takes FP8 matrices whose sides are multiples of it
FP8_SM = 89


class NoTensorRt:
    """What the exporter is given to build with where PyTorch runs the graphs: the sidecar of the decoder, and no engine."""

    def require(self, gpus: Any) -> None:
        """Nothing is needed."""

    def build(self, source: Path, out: Path, progress: Progress, **request: Any) -> None:
        """As :meth:`~medusa_export.engines.tensorrt.build.TensorRtBuilder.build`; writes what TensorRT would say of the engines."""
        shapes = BuildRequest(**request).profiles
        profiles = [
            {"name": name, "shapes": {"output_rows": [[n] for n in sizes["R"]]}} for name, sizes in shapes.items()
        ]
        sidecar = {"gpus": [f"sm{sm}" for sm in request["gpus"]], "profiles": profiles, "library": {"name": "torch"}}
        (out / DECODER_ENGINE).with_suffix(".json").write_text(json.dumps(sidecar), encoding="utf-8")


class TorchDevice:
    """See :class:`~medusa_export.engines.tensorrt.device.Device`.

    Args:
        onnx_dir: the portable graphs.
        place: "cuda" or "cpu".
        fp8_products: multiply FP8 codes as they are; otherwise as what they stand for, in the graph's dtype.
    """

    def __init__(self, onnx_dir: Path, place: str, *, fp8_products: bool) -> None:
        self.onnx_dir, self.place, self.fp8_products = onnx_dir, place, fp8_products
        self._cuda = CudaStream() if place == "cuda" else None
        self.graphs: dict[str, TorchGraph] = {}

    def load(self, engine: str) -> TorchGraph:
        self.graphs[engine] = TorchGraph(self, self.onnx_dir / GRAPHS[engine])
        return self.graphs[engine]

    def capture(self, work: Run) -> Run:
        if self._cuda:
            return self._cuda.capture(work)
        work()  # as a capture does
        return work

    def staged(self, size: int) -> torch.Tensor:
        import torch

        return torch.zeros(size, dtype=torch.int64, pin_memory=self._cuda is not None)


@dataclass
class _Node:
    """One operator of the plan.

    Attributes:
        inputs: names of values, or lists of ints that were constants.
        last_use: values that nothing reads after it.
    """

    kind: str
    inputs: list[Any]
    outputs: list[str]
    attributes: dict[str, Any]
    last_use: list[str] = field(default_factory=list)


class TorchGraph:
    """See :class:`~medusa_export.engines.tensorrt.device.Graph`.

    Attributes:
        fp8_products, dequantized: products by the device's FP8 kernel, and those of FP8 weights that are not.
        weight_bytes: of constants that a run reads whole, as they are held; tables that rows are picked from are not.
    """

    def __init__(self, device: TorchDevice, path: Path) -> None:
        import onnx

        self._device, self._shared = device, Shared()
        self._operators = operators(self._shared)
        model = onnx.load(path, load_external_data=False)
        self._values = {tensor.name: read_tensor(tensor, path.parent) for tensor in model.graph.initializer}
        values = (*model.graph.input, *model.graph.output)
        self._dtypes = {value.name: torch_dtype(value.type.tensor_type.elem_type) for value in values}
        self._inputs = [value.name for value in model.graph.input]
        self._outputs = [value.name for value in model.graph.output]
        self.fp8_products = self.dequantized = 0
        self._nodes = self._plan(path, [_node(node, self._values) for node in model.graph.node])
        used = {name for node in self._nodes for name in node.inputs if isinstance(name, str)}
        self._values = {name: value.to(device.place) for name, value in self._values.items() if name in used}
        self.weight_bytes = self._read_whole()

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def bind(self, buffers: Buffers, profile: int, *, fixed: bool) -> Run:
        """As :meth:`~medusa_export.engines.tensorrt.device.Graph.bind`."""
        import torch

        given = {name: buffers[name] for name in self._inputs}
        taken = [(name, buffers[name]) for name in self._outputs]

        def run() -> None:
            with torch.inference_mode():
                self._shared.clear()
                values = {**self._values, **given}
                for node in self._nodes:
                    inputs = [values[item] if isinstance(item, str) else item for item in node.inputs]
                    results = self._operators[node.kind](*inputs, **node.attributes)
                    results = results if isinstance(results, tuple) else (results,)
                    values.update(zip(node.outputs, results, strict=True))
                    for name in node.last_use:
                        del values[name]
                for name, buffer in taken:
                    if values[name].data_ptr() != buffer.data_ptr():
                        buffer.copy_(values[name])

        return self._device.capture(run) if fixed else run

    def _plan(self, path: Path, nodes: list[_Node]) -> list[_Node]:
        """Weights dequantized once, FP8 products as one operator, and nothing that no output needs."""
        unknown = {node.kind for node in nodes} - self._operators.keys()
        if unknown:
            raise ConfigError(
                str(path),
                f"operators {sorted(unknown)}",
                "those of engines/tensorrt/emulation/torch_operators.py",
                "take another --quant",
            )
        made = {name: node for node in nodes for name in node.outputs}
        nodes = [self._scaled(node, made) if node.kind == "MatMul" else node for node in nodes]
        read = {name for node in nodes for name in node.inputs if isinstance(name, str)}
        for node in nodes:
            if node.kind == "DequantizeLinear" and node.inputs[0] in self._values and node.outputs[0] in read:
                codes = self._values[node.inputs[0]]
                self._values[node.outputs[0]] = dequantize(codes, self._values[node.inputs[1]], **node.attributes)
        needed, kept = set(self._outputs), list[_Node]()
        for node in reversed(nodes):
            if needed.isdisjoint(node.outputs) or node.outputs[0] in self._values:
                continue
            names = {name for name in node.inputs if isinstance(name, str)}
            temporary = names - self._values.keys() - set(self._inputs) - set(self._outputs)
            node.last_use = sorted(temporary - needed)
            needed |= names
            kept.append(node)
        return kept[::-1]

    def _scaled(self, node: _Node, made: dict[str, _Node]) -> _Node:
        """The product of FP8 codes that a MatMul of dequantized values stands for, where it is one."""
        import torch

        x, weight = (made.get(name) for name in node.inputs)
        if not weight or weight.kind != "DequantizeLinear":
            return node
        codes, scale = (self._values[name] for name in weight.inputs[:2])
        if codes.dtype != torch.float8_e4m3fn:
            return node
        quantized = x is not None and x.kind == "DequantizeLinear" and scale.ndim == 0
        if not (quantized and self._device.fp8_products) or any(side % FP8_TILE for side in codes.shape):
            self.dequantized += 1
            return node
        assert x is not None  # for the type checker
        self.fp8_products += 1
        names = [x.inputs[0], f"{weight.inputs[0]}.columns"]
        self._values[names[1]] = codes.view(torch.uint8).T.contiguous().view(codes.dtype).T
        for source in (x.inputs[1], weight.inputs[1]):
            names.append(f"{source}.float32")
            self._values[names[-1]] = self._values[source].float()
        return _Node("ScaledMatMul", names, node.outputs, {"dtype": scale.dtype})

    def _read_whole(self) -> int:
        picked = Counter(str(node.inputs[0]) for node in self._nodes if node.kind == "Gather")
        readers = Counter(name for node in self._nodes for name in node.inputs if isinstance(name, str))
        return sum(value.nbytes for name, value in self._values.items() if readers[name] > picked[name])


def _node(proto: Any, constants: dict[str, torch.Tensor]) -> _Node:
    import onnx

    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in proto.attribute}
    inputs: list[Any] = list(proto.input)
    if proto.op_type in ("Reshape", "Split", "TopK"):
        inputs[1] = constants[inputs[1]].tolist()
    if proto.op_type == "Cast":
        attributes = {"to": torch_dtype(attributes["to"])}
    return _Node(proto.op_type, inputs, list(proto.output), attributes)


def torch_dtype(data_type: int) -> torch.dtype:
    """Of an ONNX element type.

    Raises:
        ConfigError: a type that torch has no numbers of.
    """
    import onnx
    import torch

    names = {
        "FLOAT": torch.float32, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16, "FLOAT8E4M3FN": torch.float8_e4m3fn,
        "INT8": torch.int8, "INT4": torch.int8, "INT64": torch.int64, "BOOL": torch.bool,
    }  # fmt: skip
    name = onnx.TensorProto.DataType.Name(data_type)
    if name not in names:
        raise ConfigError("a graph's tensor", name, f"one of {', '.join(names)}", "take another --quant")
    return names[name]


def read_tensor(proto: Any, directory: Path) -> torch.Tensor:
    """A stored tensor; 4-bit numbers come as int8."""
    import onnx
    import torch

    dtype = torch_dtype(proto.data_type)
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        place = {item.key: item.value for item in proto.external_data}
        offset, length = int(place["offset"]), int(place["length"])
        raw: Any = np.memmap(directory / place["location"], mode="c", offset=offset, shape=(length,), dtype=np.uint8)
    else:
        raw = np.frombuffer(bytearray(proto.raw_data), dtype=np.uint8)
    stored = torch.from_numpy(raw)
    if proto.data_type == onnx.TensorProto.INT4:
        packed = stored.view(torch.int8)
        stored = torch.stack(
            [(packed << 4) >> 4, packed >> 4], dim=-1
        ).flatten()  # the low half comes first; both signed
    return stored.view(dtype).reshape(list(proto.dims))
