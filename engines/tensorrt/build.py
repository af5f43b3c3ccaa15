"""Builds TensorRT engines from the portable ONNX graphs: one code path for TensorRT-RTX, ahead of time, and for TensorRT on its GPU.

An engine that was built ahead of time is finished on the device (TensorRT-RTX compiles its kernels there), and cannot be opened
without one: that it was built proves that the graph is accepted, neither its speed nor its numbers. What an engine takes and gives
is therefore read from the network and written beside it. Source: NVIDIA's TensorRT and TensorRT-RTX documentation, "Python API".
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_export.core.artifacts.hashing import sha256
from medusa_export.core.errors import ConfigError
from medusa_export.core.json_fields import read_json
from medusa_export.core.threads import StopPoint, run_all
from medusa_export.core.user_cache import user_cache
from medusa_export.engines.tensorrt.library import RTX, TensorRtLibrary, find_tensorrt, local_gpu
from medusa_export.heads.contract.engine_info import DECODER_FILE, HEADS_FILE

logger = logging.getLogger(__name__)

DECODER_ENGINE, HEADS_ENGINE = "rank0.engine", "heads.engine"
GRAPHS = {DECODER_ENGINE: DECODER_FILE, HEADS_ENGINE: HEADS_FILE}
BEST_PROMPT = 512  # tokens of a prompt that kernels are chosen for
SLOW_PHASE = "Computing profile costs"  # where the time goes: kernels are compiled or timed
HARMLESS = (
    "Make sure",
    "minShape is not the same as maxShape",
)  # warnings that every graph with integers or profiles draws
# What TensorRT says when it refuses a graph: the way out. The first pattern that is found counts.
ACTIONS = {
    r"out of memory|OutOfMemory|cudaErrorMemoryAllocation|insufficient (?:workspace|memory)":
        "free memory of the GPU, or take a smaller --max-length",
    r"not (?:supported|implemented)|unsupported|no (?:importer|tactic)|could not find any implementation":
        "take another --quant: this library has no kernel for the operator on this GPU",
}  # fmt: skip
OTHERWISE = "take another --quant, or --engine onnxruntime or tensorrt-llm"
Progress = Callable[[str, int, int], None]
Sizes = Mapping[str, tuple[int, int, int]]  # symbolic dimension: smallest, best, largest


@dataclass(frozen=True)
class BuildRequest:
    """What an engine is built for.

    Attributes:
        gpus: compute capabilities, as 10 * major + minor.
        max_length: tokens of prompt and answer together.
        max_nodes: of the largest tree; the kernels are chosen for ``nodes``.
    """

    gpus: tuple[int, ...]
    max_length: int
    max_nodes: int
    nodes: int

    @property
    def profiles(self) -> dict[str, Sizes]:
        """The shapes of both kinds of run: S new tokens, R rows that give logits."""
        step = (1, min(self.nodes, self.max_length), min(self.max_nodes, self.max_length))
        prompt = (1, min(BEST_PROMPT, self.max_length), self.max_length)
        return {"prefill": {"S": prompt, "R": (1, 1, 1)}, "step": {"S": step, "R": step}}


class TensorRtBuilder:
    """What the exporter is given to build with."""

    def require(self, target: Sequence[int]) -> None:
        """Raise MedusaExportError unless engines for these GPUs can be built on this machine."""
        find_tensorrt(target, local_gpu())

    def build(self, source: Path, out: Path, progress: Progress, **request: Any) -> None:
        """``rank0.engine`` and, where there are heads, ``heads.engine`` in ``out``, each with a JSON file beside it.

        Args:
            source: the directory of the portable graphs.
            progress: called with (stage, done, total).
            request: the fields of :class:`BuildRequest`.

        Raises:
            ConfigError: TensorRT refuses a graph; its own words are in the message.
        """
        wanted = BuildRequest(**request)
        tensorrt = find_tensorrt(wanted.gpus, local_gpu())

        def build(engine: str, stop_point: StopPoint) -> None:
            build_engine(source / GRAPHS[engine], out / engine, tensorrt, wanted, progress, stop_point)

        there = [engine for engine, graph in GRAPHS.items() if (source / graph).is_file()]
        run_all(build, there, workers=1)  # a signal's exception would be lost in TensorRT, were this thread in there


def build_engine(
    graph: Path,
    engine: Path,
    tensorrt: TensorRtLibrary,
    request: BuildRequest,
    progress: Progress,
    stop_point: StopPoint = lambda: None,
) -> None:
    """One engine and its sidecar; see :meth:`TensorRtBuilder.build`.

    Args:
        stop_point: raises to end the build, which it does after the step that TensorRT is at.
    """
    trt = tensorrt.module
    log = _log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise refused_graph(
            graph, tensorrt, [f"{error.node_operator()} {error.node_name()}: {error.desc()}" for error in errors]
        )
    config = builder.create_builder_config()
    ahead = tensorrt.name == RTX
    if ahead:
        config.num_compute_capabilities = len(request.gpus)
        for index, sm in enumerate(request.gpus):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # or a CUDA graph cannot be captured
    profiles = _add_profiles(builder, network, config, request)
    monitor = config.progress_monitor = _monitor(trt, engine.name, progress, stop_point)
    with _timing_cache(config, tensorrt, request.gpus):
        plan = builder.build_serialized_network(network, config)
    if monitor.failure:
        raise monitor.failure
    if plan is None:
        raise refused_graph(graph, tensorrt, log.errors)
    engine.write_bytes(plan)
    sidecar = {
        "file": engine.name,
        "bytes": engine.stat().st_size,
        "sha256": sha256(engine),
        "library": {"name": tensorrt.name, "version": tensorrt.version},
        "gpus": [f"sm{sm}" for sm in request.gpus],
        "ahead_of_time": ahead,
        "profiles": profiles,
        "inputs": [_describe(network.get_input(index)) for index in range(network.num_inputs)],
        "outputs": [_describe(network.get_output(index)) for index in range(network.num_outputs)],
        "graph": {path.name: sha256(path) for path in sorted(graph.parent.glob(f"{graph.name}*"))},
    }
    engine.with_suffix(".json").write_text(json.dumps(sidecar, indent=1) + "\n", encoding="utf-8")


def check_sidecars(engine_dir: Path) -> list[str]:
    """Engines of a directory that are not what was built, one line each."""
    problems = []
    for engine in GRAPHS:
        path = engine_dir / engine
        if engine == DECODER_ENGINE or path.is_file():
            built = read_json(path.with_suffix(".json"))
            if not path.is_file() or sha256(path) != built.get("sha256"):
                problems.append(f"{path}: not the engine that {path.with_suffix('.json').name} describes")
    return problems


def _add_profiles(builder: Any, network: Any, config: Any, request: BuildRequest) -> list[dict[str, Any]]:
    """One optimization profile a kind of run, from the names of the inputs' dimensions; none where all shapes are fixed."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    dynamic = [tensor for tensor in inputs if -1 in tuple(tensor.shape)]
    added = []
    for name, sizes in request.profiles.items() if dynamic else ():
        profile, shapes = builder.create_optimization_profile(), {}
        for tensor in dynamic:
            shapes[tensor.name] = [_shape(tensor, sizes, which) for which in range(3)]
            profile.set_shape(tensor.name, *shapes[tensor.name])
        config.add_optimization_profile(profile)
        added.append({"name": name, "shapes": shapes})
    return added


def _shape(tensor: Any, sizes: Sizes, which: int) -> tuple[int, ...]:
    names = [tensor.get_dimension_name(axis) for axis in range(len(tensor.shape))]
    return tuple(sizes[name][which] if size == -1 else size for name, size in zip(names, tensor.shape, strict=True))


def _describe(tensor: Any) -> dict[str, Any]:
    names = [tensor.get_dimension_name(axis) for axis in range(len(tensor.shape))]
    shape = [name or -1 if size == -1 else size for name, size in zip(names, tensor.shape, strict=True)]
    return {"name": tensor.name, "dtype": str(tensor.dtype).removeprefix("DataType.").lower(), "shape": shape}


def refused_graph(graph: Path, tensorrt: TensorRtLibrary, errors: Sequence[str]) -> ConfigError:
    """What to say of a graph that TensorRT does not build.

    Args:
        graph: its file.
        tensorrt: the library that refused it.
        errors: lines that its log had.
    """
    said = "; ".join(dict.fromkeys(errors)) or "no reason"
    action = next((action for pattern, action in ACTIONS.items() if re.search(pattern, said, re.IGNORECASE)), OTHERWISE)
    return ConfigError(str(graph), f"{tensorrt.name} {tensorrt.version}: {said}", "a graph that it builds", action)


def _log(trt: Any) -> Any:
    """A TensorRT logger: its errors are kept for the exception, the rest goes to Python's log."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            elif not message.startswith(HARMLESS):
                logger.log(logging.INFO if severity == trt.ILogger.WARNING else logging.DEBUG, "%s", message)

    return Log()


def _monitor(trt: Any, stage: str, progress: Progress, stop_point: StopPoint) -> Any:
    """TensorRT's progress as one bar: the steps of its slow phase. What is raised in here is kept, and ends the build."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.done, self.total = 0, 0
            self.failure: BaseException | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            logger.debug("%s: %s, %d steps", stage, phase, steps)
            if phase == SLOW_PHASE:
                self.total += steps
                self._show()

        def phase_finish(self, phase: str) -> None:
            logger.debug("%s: %s finished", stage, phase)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == SLOW_PHASE:
                self.done += 1
            self._show()
            return self.failure is None

        def _show(self) -> None:
            try:  # TensorRT would lose an exception
                stop_point()
                progress(stage, self.done, self.total)
            except BaseException as error:
                self.failure = error

    return Monitor()


@contextmanager
def _timing_cache(config: Any, tensorrt: TensorRtLibrary, gpus: Sequence[int]) -> Iterator[None]:
    """Keep what TensorRT measured on this GPU for later builds; TensorRT-RTX measures nothing when it builds.

    A cache that cannot be read or written costs a warning and time, never the build.
    """
    root = user_cache()
    if tensorrt.name == RTX or root is None:
        yield
        return
    path = root / "tensorrt" / f"{tensorrt.version}-{'-'.join(f'sm{sm}' for sm in gpus)}.timing"
    cache = config.create_timing_cache(_read(path))
    if not config.set_timing_cache(cache, False):
        logger.warning("%s: not of this TensorRT and GPU; measuring again", path)
        config.set_timing_cache(config.create_timing_cache(b""), False)
    yield
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            file.write(config.get_timing_cache().serialize())
        Path(file.name).replace(path)
    except OSError as error:
        logger.warning("%s: the timings are not kept for other builds (%s)", path, error)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
