"""TensorRT engines on the GPU of this machine, with torch's CUDA tensors as buffers and runs of fixed shapes as CUDA graphs.

Not run yet: no machine with a GPU was at hand. What is above it, engines/tensorrt/engine.py, is tested on
engines/tensorrt/emulation/onnx_device.py, which takes the same buffers.
Source of the calls: NVIDIA's TensorRT-RTX documentation, "Python API" and "Working with RTX CUDA Graphs".
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from medusa_export.core.errors import ConfigError, MissingPackageError
from medusa_export.core.json_fields import read_json
from medusa_export.engines.tensorrt.build import DECODER_ENGINE
from medusa_export.engines.tensorrt.library import RTX, import_tensorrt, local_gpu

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Buffers = Mapping[str, "torch.Tensor"]
Run = Callable[[], None]


class Graph(Protocol):
    """One engine file, loaded."""

    def dtype(self, name: str) -> torch.dtype:
        """Of an input's or output's buffer."""

    def bind(self, buffers: Buffers, profile: int, *, fixed: bool) -> Run:
        """What runs the graph on these buffers, which stay where they are.

        Args:
            buffers: every input and output; the shapes are theirs.
            profile: 0 for prompts, 1 for steps.
            fixed: this is run again and again; others are run before the next is bound.
        """


class Device(Protocol):
    """Where buffers are and graphs run."""

    place: str  # torch's name of it

    def load(self, engine: str) -> Graph:
        """The graph of an engine file, by its name."""

    def capture(self, work: Run) -> Run:
        """Torch operations on fixed buffers, made ready to be run again and again; they are run once or more in between."""

    def staged(self, size: int) -> torch.Tensor:
        """int64 on the host, from where a copy to the device need not wait."""


@cache
def process_stream() -> Any:
    """One for all engines of this process: torch's operations on one's buffers would not wait for another's stream."""
    import torch

    stream = torch.cuda.Stream()
    torch.cuda.set_stream(stream)  # TensorRT synchronizes more on the default stream
    return stream


class CudaStream:
    """A stream of the GPU that torch sees first, as torch's current one, and what is captured on it."""

    def __init__(self) -> None:
        self.stream = process_stream()

    def capture(self, work: Run) -> Run:
        """See :meth:`Device.capture`."""
        import torch

        work()  # whatever is compiled or allocated the first time, before the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            work()
        replay: Run = graph.replay
        return replay


class CudaDevice(CudaStream):
    """The GPU that torch sees first, with TensorRT on it.

    Args:
        engine_dir: with engines and their sidecars.
        any_gpu: try engines that were not built for this GPU.

    Raises:
        ConfigError: no GPU, or another one than the engines are for.
        MissingPackageError: the TensorRT that built them is not installed.
    """

    place = "cuda"

    def __init__(self, engine_dir: Path, *, any_gpu: bool = False) -> None:
        self.engine_dir = engine_dir
        built, here = read_json(engine_dir / f"{Path(DECODER_ENGINE).stem}.json"), local_gpu()
        where, targets = str(engine_dir / DECODER_ENGINE), ", ".join(built["gpus"])
        if here is None:
            raise ConfigError(
                where, "no NVIDIA GPU here", f"one of {targets}", "run it there, or export with --engine onnxruntime"
            )
        if f"sm{here}" not in built["gpus"] and not any_gpu:
            raise ConfigError(where, f"a GPU of sm{here}", f"one of {targets}", f"export again with --gpu sm{here}")
        library = built["library"]
        tensorrt = import_tensorrt(library["name"])
        if tensorrt is None:
            got = "not installed"
            raise MissingPackageError(
                library["name"], got, f"{library['version']}, which built the engine", "install it"
            )
        super().__init__()
        self.tensorrt = tensorrt
        self._runtime = tensorrt.module.Runtime(tensorrt.module.Logger(tensorrt.module.Logger.WARNING))

    def load(self, engine: str) -> CudaGraph:
        path = self.engine_dir / engine
        loaded = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if loaded is None:
            version = f"{self.tensorrt.name} {self.tensorrt.version}"
            raise ConfigError(str(path), f"an engine that {version} does not open", "one that it built", "export again")
        return CudaGraph(self, loaded)

    def staged(self, size: int) -> torch.Tensor:
        import torch

        return torch.zeros(size, dtype=torch.int64, pin_memory=True)


class CudaGraph:
    """See :class:`Graph`. A profile has one context for runs that are not repeated, and each repeated run has its own."""

    def __init__(self, device: CudaDevice, engine: Any) -> None:
        self._device, self._engine = device, engine
        self._names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self._contexts: dict[int, Any] = {}

    def dtype(self, name: str) -> torch.dtype:
        import torch

        dtypes = {
            "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.int64,
            "INT32": torch.int32, "BOOL": torch.bool,
        }  # fmt: skip
        return dtypes[self._engine.get_tensor_dtype(name).name]

    def bind(self, buffers: Buffers, profile: int, *, fixed: bool) -> Run:
        """As :meth:`Graph.bind`."""
        context = self._context(profile) if fixed else self._contexts.get(profile) or self._context(profile)
        if not fixed:
            self._contexts[profile] = context
        inputs = self._device.tensorrt.module.TensorIOMode.INPUT
        for name in self._names:
            if self._engine.get_tensor_mode(name) == inputs:
                context.set_input_shape(name, tuple(buffers[name].shape))
            context.set_tensor_address(name, buffers[name].data_ptr())

        def run() -> None:
            if not context.execute_async_v3(self._device.stream.cuda_stream):
                raise ConfigError("TensorRT", "a run that failed", "a run", "see its messages above")

        capturable = getattr(context, "is_stream_capturable", lambda stream: True)
        if not fixed or not capturable(self._device.stream.cuda_stream):
            return run
        return self._device.capture(run)

    def _context(self, profile: int) -> Any:
        trt = self._device.tensorrt
        if trt.name == RTX:  # kernels for the very shapes, before the first run: it may be captured
            config = self._engine.create_runtime_config()
            config.dynamic_shapes_kernel_specialization_strategy = (
                trt.module.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context()
        if self._engine.num_optimization_profiles > 1:
            context.set_optimization_profile_async(profile, self._device.stream.cuda_stream)
        return context
