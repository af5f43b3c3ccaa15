"""What NVIDIA's own Python classes say of a checkpoint: TensorRT-LLM's source loads it on a CPU, with stand-ins for its binaries.

    MEDUSA_EXPORT_TRTLLM_SOURCE=DIR python benchmarks/trtllm_source.py OUT/trtllm [OUT2/trtllm ...]

DIR is a checkout of TensorRT-LLM with the engine backend (0.15 was tried). ``MedusaForCausalLm.from_checkpoint`` reads config.json,
builds the model, quantizes its layers, and takes every tensor of every rank; each rank is a process of its own. TensorRT-RTX's
bindings stand for TensorRT's. Nothing is built, and no kernel runs: what lays INT8 and INT4 weights out for a GPU gives back their
shape alone. INT4 AWQ needs what build.sh sets too: PYTHONPATH=OUT/engine/awq.
"""

from __future__ import annotations

import enum
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

SOURCE = "MEDUSA_EXPORT_TRTLLM_SOURCE"
# Binary modules of the package itself, and what newer transformers no longer have.
INSIDE = ("tensorrt_llm.bindings", "tensorrt_llm.libs", "transformers.", "torch.onnx.")
# Modules that run engines or plan for several GPUs; they import much, and nothing of a checkpoint.
NOT_LOADED = tuple(f"tensorrt_llm.{name}" for name in (
    "auto_parallel", "auto_parallel.config", "auto_parallel.cluster_info", "llmapi", "llmapi.llm", "llmapi.llm_utils", "llmapi.utils",
    "runtime", "executor",
))  # fmt: skip
OTHERS = (  # what it imports besides, and what loading a checkpoint does not need
    "aenum", "cuda", "colored", "datasets", "diffusers", "evaluate", "graphviz", "h5py", "janus", "lark", "mpi4py", "nltk", "nvtx",
    "onnx_graphsurgeon", "optimum", "ordered_set", "polygraphy", "pulp", "rouge_score", "zmq",
)  # fmt: skip


class _Anything(type):
    """A class that has every attribute, each a class of the same kind, and is equal to itself alone."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Anything(name, (StandIn,), {})
        setattr(cls, name, made)
        return made

    def __iter__(cls) -> Iterator[Any]:
        return iter(())


class StandIn(metaclass=_Anything):
    """Can be called, entered, subclassed and asked for anything; computes nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args and callable(args[0]) else StandIn()  # a decorator leaves what it decorates


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Anything(name, (StandIn,), {})
        setattr(self, name, made)
        return made


class StrEnum(str, enum.Enum):
    """As the package of that name has it."""

    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[Any]) -> str:
        return name

    def __str__(self) -> str:
        return str(self.value)


class StandIns:
    """A meta-path finder: last, so that whatever is installed comes first."""

    @staticmethod
    def find_spec(
        name: str, path: Any = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A module that has everything, for the names above and what is inside of them."""
        if not (name.startswith(INSIDE) or name.partition(".")[0] in OTHERS):
            return None
        return importlib.machinery.ModuleSpec(name, StandIns, is_package=True)  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """As importlib asks for it."""
        return _Module(spec.name)

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        """Nothing to run."""


def load_rank(checkpoint: Path, rank: int) -> dict[str, Any]:
    """One rank, in this process.

    Returns:
        what the logger said, the name of an error, and how many parameters and quantized layers there are.
    """
    tensorrt_llm, warnings = import_source()
    from tensorrt_llm.models import MedusaForCausalLm
    from tensorrt_llm.models.modeling_utils import PretrainedConfig

    try:
        config = PretrainedConfig.from_json_file(str(checkpoint / "config.json"))
        config.set_rank(rank)
        model = MedusaForCausalLm.from_checkpoint(str(checkpoint), rank=rank, config=config)
    except Exception as error:  # whatever it says is what is asked for
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error}"[:600]
        return {
            "rank": rank,
            "error": text,
            "where": f"{Path(where.filename).name}:{where.lineno}",
            "warnings": warnings,
        }
    parameters = dict(model.named_parameters())
    return {
        "rank": rank,
        "release": tensorrt_llm.__version__,
        "parameters": len(parameters),
        "without a value": sorted(name for name, each in parameters.items() if not each.is_inited()),
        "layers": sorted({type(each).__name__ for _, each in model.named_modules() if "Linear" in type(each).__name__}),
        "warnings": warnings,
    }


def import_source() -> tuple[ModuleType, list[str]]:
    """TensorRT-LLM from its source, and the list that its warnings go into."""
    import tensorrt_rtx_bindings
    import transformers

    os.environ["TRT_LLM_NO_LIB_INIT"] = "1"
    sys.path.insert(0, os.environ[SOURCE])
    sys.modules["tensorrt"] = tensorrt_rtx_bindings
    sys.modules["pynvml"] = None  # type: ignore[assignment]  # as if not installed: it wants a driver
    sys.modules |= {name: _Module(name) for name in NOT_LOADED}
    _complete(transformers)
    sys.modules["strenum"] = sys.modules["StrEnum"] = _strenum()
    sys.meta_path.append(StandIns)  # a class with the methods is a finder
    library = torch.library.Library("trtllm", "DEF")
    library.define("preprocess_weights_for_mixed_gemm(Tensor weight, ScalarType kind, ScalarType act) -> Tensor")
    library.impl("preprocess_weights_for_mixed_gemm", lambda weight, kind, act: weight.clone(), "CPU")
    library.define("symmetric_quantize_last_axis_of_batched_matrix(Tensor weight, ScalarType kind) -> (Tensor, Tensor)")
    library.impl("symmetric_quantize_last_axis_of_batched_matrix", _weight_only, "CPU")
    setattr(torch.cuda, "get_device_properties", lambda *_: StandIn())  # noqa: B010 - mypy knows what it returns
    import tensorrt_llm
    from tensorrt_llm.logger import logger

    tensorrt_llm._kept = library
    warnings: list[str] = []
    logger.warning = lambda *texts: warnings.append(" ".join(map(str, texts)))
    return tensorrt_llm, warnings


def _weight_only(weight: torch.Tensor, kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes of quantized rows and of their scales.  # [in, out] -> int8 [in, out] or, of INT4, [in, out / 2], and [out]"""
    width = weight.shape[1] // (1 if kind == torch.int8 else 2)
    return torch.zeros((len(weight), width), dtype=torch.int8), weight.abs().amax(dim=0)


def _complete(module: ModuleType) -> None:
    """A stand-in for every name that a module does not have."""
    own = type(module)

    def get(self: ModuleType, name: str) -> Any:
        try:
            return own.__getattr__(self, name)  # transformers loads lazily
        except AttributeError:
            if name.startswith("__"):
                raise
            return _Anything(name, (StandIn,), {})

    module.__class__ = type(own.__name__, (own,), {"__getattr__": get})


def _strenum() -> ModuleType:
    """The one package whose class has to be what it is."""
    module: Any = ModuleType("strenum")
    module.StrEnum = StrEnum
    return module


def load(checkpoint: Path) -> list[dict[str, Any]]:
    """Every rank of a checkpoint, each in a process of its own."""
    ranks = json.loads((checkpoint / "config.json").read_text()).get("mapping", {}).get("tp_size", 1)
    found = []
    for rank in range(ranks):
        command = [sys.executable, __file__, "--rank", str(rank), str(checkpoint)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        last = (done.stdout.strip().splitlines() or [""])[-1]
        found.append(json.loads(last) if last.startswith("{") else {"rank": rank, "error": done.stderr.strip()[-600:]})
    return found


def main(arguments: Sequence[str]) -> int:
    """Print what it says of each checkpoint; 1 where one was refused."""
    if SOURCE not in os.environ:
        print(f"skipped: {SOURCE} names no source tree of TensorRT-LLM")
        return 0
    if arguments[:1] == ["--rank"]:
        print(json.dumps(load_rank(Path(arguments[2]), int(arguments[1]))))
        return 0
    refused = 0
    for checkpoint in map(Path, arguments):
        for said in load(checkpoint):
            refused += "error" in said or bool(said["without a value"])
            print(checkpoint, json.dumps(said, indent=1))
    return min(refused, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
