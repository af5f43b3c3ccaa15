"""ONNX Runtime in the place of TensorRT: runs the very graphs that TensorRT was given, on the same buffers, on a CPU.

It proves inputs, outputs, shapes, numbers and the protocol above it before a GPU sees any of them. It is no engine to serve with.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa_export.core.errors import ConfigError
from medusa_export.engines.onnxruntime.engine import import_onnxruntime, session_options, share, share_threads
from medusa_export.engines.tensorrt.build import GRAPHS
from medusa_export.engines.tensorrt.device import Buffers, Run
from medusa_export.engines.tensorrt.emulation.onnx_lift import lifted

if TYPE_CHECKING:
    import torch

AS_WRITTEN = {"session.disable_quant_qdq": "1"}  # every rounding where the graph has it


class OnnxDevice:
    """See :class:`~medusa_export.engines.tensorrt.device.Device`.

    Args:
        onnx_dir: the portable graphs.
    """

    place = "cpu"

    def __init__(self, onnx_dir: Path) -> None:
        self.onnx_dir = onnx_dir

    def load(self, engine: str) -> OnnxGraph:
        return OnnxGraph(self.onnx_dir / GRAPHS[engine])

    def capture(self, work: Run) -> Run:
        work()  # as a capture does
        return work

    def staged(self, size: int) -> torch.Tensor:
        import torch

        return torch.zeros(size, dtype=torch.int64)


class OnnxGraph:
    """See :class:`~medusa_export.engines.tensorrt.device.Graph`."""

    def __init__(self, path: Path) -> None:
        ort = import_onnxruntime()
        share_threads(ort, 0)
        options, changed = session_options(ort, AS_WRITTEN), lifted(path)
        if changed:
            model, arrays = changed
            self._arrays = arrays  # ONNX Runtime does not copy them
            options.add_external_initializers(list(arrays), [share(array) for array in arrays.values()])
        try:
            source = model if changed else str(path)
            self._session: Any = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises its own classes, all derived from Exception
            raise ConfigError(str(path), f"{error}", "a graph that ONNX Runtime opens", "export again") from error
        self._inputs = {item.name for item in self._session.get_inputs()}
        items = (*self._session.get_inputs(), *self._session.get_outputs())
        self._dtypes = {item.name: item.type.removeprefix("tensor(").removesuffix(")") for item in items}

    def dtype(self, name: str) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, {"float": "float32"}.get(self._dtypes[name], self._dtypes[name]))
        return dtype

    def bind(self, buffers: Buffers, profile: int, *, fixed: bool) -> Run:
        """As :meth:`~medusa_export.engines.tensorrt.device.Graph.bind`."""
        binding = self._session.io_binding()
        for name, buffer in buffers.items():
            bind = binding.bind_ortvalue_input if name in self._inputs else binding.bind_ortvalue_output
            bind(name, share(buffer.numpy()))

        def run() -> None:
            self._session.run_with_iobinding(binding)

        if fixed:
            run()  # as a capture does
        return run
