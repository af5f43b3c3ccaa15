"""What can be made, run and served with the packages and GPUs at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from medusa_export.exporter.doctor.packages import PACKAGES, Found
from medusa_export.quantize.format_facts import TensorRt
from medusa_export.quantize.formats import FORMATS, Format

AnyOf = tuple[str, ...]  # names of packages, one of which is enough
GPU = "an NVIDIA GPU"


@dataclass(frozen=True)
class Ability:
    """One thing that can be done.

    Attributes:
        name: what is printed.
        needs: packages, each by its name or as several of which one is enough.
        on_gpu: whether a GPU of NVIDIA's has to be here.
    """

    name: str
    needs: tuple[AnyOf, ...]
    on_gpu: bool = False

    def missing(self, found: Mapping[str, Found], gpus: Sequence[int]) -> list[str]:
        """What it lacks here, by name; of several that would do, the first.

        Args:
            found: what :func:`~medusa_export.exporter.doctor.packages.find_packages` says.
            gpus: compute capabilities of those that are here.
        """
        lacks = [names[0] for names in self.needs if not any(found[name].works for name in names)]
        return lacks + [GPU] * (self.on_gpu and not gpus)


def _needs(*names: str | AnyOf) -> tuple[AnyOf, ...]:
    return tuple((name,) if isinstance(name, str) else name for name in names)


_GRAPH = ("PyTorch", "ONNX", "ONNX Runtime")  # ONNX Runtime opens what was written
_FRONT = ("FastAPI", "uvicorn", "Prometheus client", "llguidance")
_TENSORRT = ("TensorRT-RTX", "TensorRT")

CHECKPOINT = Ability("make a TensorRT-LLM or Hugging Face checkpoint", _needs("PyTorch"))
CALIBRATION = Ability("calibrate a format", _needs("PyTorch", "ModelOpt"))


@dataclass(frozen=True)
class EngineAbilities:
    """What can be done with the engines of one kind.

    Attributes:
        fits: whether an engine of a format runs on one of these GPUs, or needs none.
    """

    make: Ability
    run: Ability
    serve: Ability
    fits: Callable[[Format, Sequence[int]], bool]


def _on_cpu(weight_format: Format, gpus: Sequence[int]) -> bool:
    return weight_format.onnxruntime is not None


def _with_tensorrt(weight_format: Format, gpus: Sequence[int]) -> bool:
    row = weight_format.tensorrt
    return isinstance(row, TensorRt) and any(sm >= row.min_sm for sm in gpus)


def _with_trtllm(weight_format: Format, gpus: Sequence[int]) -> bool:
    row = weight_format.trtllm
    return any(row.min_sm <= sm and (row.max_sm is None or sm <= row.max_sm) for sm in gpus)


# By --engine.
ENGINES: dict[str, EngineAbilities] = {
    "onnxruntime": EngineAbilities(
        Ability("make an ONNX Runtime engine", _needs(*_GRAPH)),
        Ability("run an ONNX Runtime engine", _needs("ONNX Runtime")),
        Ability("serve an ONNX Runtime engine (medusa-serve)", _needs("ONNX Runtime", *_FRONT)),
        _on_cpu,
    ),
    "tensorrt": EngineAbilities(
        Ability("build a TensorRT engine", _needs(*_GRAPH, _TENSORRT)),
        Ability("run a TensorRT engine", _needs("PyTorch", _TENSORRT), on_gpu=True),
        Ability("serve a TensorRT engine (medusa-serve)", _needs("PyTorch", _TENSORRT, *_FRONT), on_gpu=True),
        _with_tensorrt,
    ),
    "tensorrt-llm": EngineAbilities(
        Ability("build a TensorRT-LLM engine", _needs("PyTorch", "TensorRT-LLM", "trtllm-build"), on_gpu=True),
        Ability("run a TensorRT-LLM engine", _needs("TensorRT-LLM"), on_gpu=True),
        Ability("serve a TensorRT-LLM engine (Triton)", _needs("Triton server", "TensorRT-LLM"), on_gpu=True),
        _with_trtllm,
    ),
}
OTHERS = (
    Ability("write a Triton repository", _needs("Triton client")),
    Ability("serve an ONNX Runtime engine in Triton", _needs("Triton server")),
    Ability("make training data with a server", _needs("openai")),
    Ability("train heads", _needs("PyTorch", "matplotlib", "TensorBoard")),
    Ability(
        "train heads with the model (--joint, --quant)",
        _needs("PyTorch", "matplotlib", "TensorBoard", "ModelOpt", "PEFT"),
    ),
)


def abilities() -> list[Ability]:
    """All of them, in the order in which they are needed."""
    return [
        CHECKPOINT,
        CALIBRATION,
        *(each for row in ENGINES.values() for each in (row.make, row.run, row.serve)),
        *OTHERS,
    ]


def to_install(found: Mapping[str, Found], gpus: Sequence[int]) -> dict[str, list[str]]:
    """What would bring what is missing: a command, or where to get it -> the names of the packages."""
    lacking = dict.fromkeys(name for each in abilities() for name in each.missing(found, gpus))
    commands: dict[str, list[str]] = {}
    for name in lacking.keys() & PACKAGES.keys():
        commands.setdefault(PACKAGES[name].install, []).append(name)
    return {command: sorted(commands[command]) for command in sorted(commands)}


def runs_on(weight_format: Format, found: Mapping[str, Found], gpus: Sequence[int]) -> list[str]:
    """The engines of a format that run on this machine, by --engine.

    Args:
        weight_format: of the linears.
        found: what is on this machine.
        gpus: that are looked at.
    """
    return [name for name, row in ENGINES.items() if row.fits(weight_format, gpus) and not row.run.missing(found, gpus)]


def checkpoint_lacks(weight_format: Format, found: Mapping[str, Found]) -> list[str]:
    """What is missing for a checkpoint of a format."""
    return (CALIBRATION if weight_format.needs_calibration else CHECKPOINT).missing(found, ())


def formats_here(found: Mapping[str, Found], gpus: Sequence[int]) -> dict[str, tuple[list[str], list[str]]]:
    """By format: what its checkpoint lacks, and the engines of it that run here."""
    return {name: (checkpoint_lacks(row, found), runs_on(row, found, gpus)) for name, row in FORMATS.items()}
