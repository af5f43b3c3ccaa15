"""What --engine may name, and the facts about each kind; what writes them is in exporter/pipeline/engine_writers.py."""

from __future__ import annotations

from dataclasses import dataclass

from medusa_export.core.errors import ConfigError

GPU_TREE, CPU_TREE = "medusa-63", "cpu-3"


@dataclass(frozen=True)
class EngineKind:
    """A kind of engine.

    Attributes:
        description: for --help.
        tree: the preset tree that it gets when none is asked for.
        has_graph: whether it is made of an ONNX graph; otherwise it is made of the TensorRT-LLM checkpoint.
        runs_here: whether the engine runs where it is made, so that trees can be measured on it.
        takes_gpus: whether --gpu chooses the GPUs that it is built for.
    """

    description: str
    tree: str
    has_graph: bool
    runs_here: bool = False
    takes_gpus: bool = False


ENGINES: dict[str, EngineKind] = {
    "onnxruntime": EngineKind("ONNX Runtime on a CPU", CPU_TREE, has_graph=True, runs_here=True),
    "tensorrt": EngineKind("TensorRT for the GPUs of --gpu", GPU_TREE, has_graph=True, takes_gpus=True),
    "tensorrt-llm": EngineKind(
        "TensorRT-LLM, built by trtllm-build where that is installed, else by the build.sh that is written",
        GPU_TREE,
        has_graph=False,
    ),
}
NO_ENGINE = "none"


def engine_kind(name: str) -> EngineKind | None:
    """The kind of that name, None for "none".

    Raises:
        ConfigError: an unknown name.
    """
    if name not in (*ENGINES, NO_ENGINE):
        raise ConfigError("--engine", repr(name), f"{', '.join(ENGINES)} or {NO_ENGINE}", "pick one of them")
    return ENGINES.get(name)
