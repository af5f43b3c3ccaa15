"""The packages and programs that the parts of this project stand on: which are here, and whether they import."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata

TIMEOUT = 120.0  # seconds that an import may take: the first one of a large package reads gigabytes


@dataclass(frozen=True)
class Package:
    """Something to install.

    Attributes:
        name: what is printed.
        brings: what it is for.
        install: the command that brings it, or where it comes from.
        modules: names that it is imported by; one is enough, since some packages have their parts under several.
        distributions: what package managers call it, to ask for the version.
        program: what is looked for on the PATH instead; such a row has no modules.
        folder: where the program lies in NVIDIA's containers, off the PATH.
    """

    name: str
    brings: str
    install: str
    modules: tuple[str, ...] = ()
    distributions: tuple[str, ...] = ()
    program: str = ""
    folder: str = ""


def _extra(name: str) -> str:
    return f"pip install 'medusa-export[{name}]'"


PACKAGES: dict[str, Package] = {
    row.name: row
    for row in (
        Package("PyTorch", "every export", _extra("modelopt"), ("torch",), ("torch",)),
        Package("ModelOpt", "calibration", _extra("modelopt"), ("modelopt",), ("nvidia-modelopt",)),
        Package("ONNX", "ONNX and TensorRT graphs", _extra("onnx"), ("onnx",), ("onnx",)),
        Package("ONNX Runtime", "engines on a CPU", _extra("onnx"), ("onnxruntime",), ("onnxruntime", "onnxruntime-gpu")),
        Package(
            "TensorRT-RTX", "engines for GPUs that are not here", _extra("tensorrt-rtx"), ("tensorrt_rtx", "tensorrt_rtx_bindings"),
            ("tensorrt-rtx", "tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu12_bindings"),
        ),
        Package("TensorRT", "engines for the GPU that is here", "pip install tensorrt", ("tensorrt",), ("tensorrt",)),
        Package("TensorRT-LLM", "its engines", _extra("tensorrt-llm"), ("tensorrt_llm",), ("tensorrt_llm", "tensorrt-llm")),
        Package("trtllm-build", "building its engines", _extra("tensorrt-llm"), program="trtllm-build"),
        Package("FastAPI", "medusa-serve", _extra("serve"), ("fastapi",), ("fastapi",)),
        Package("uvicorn", "medusa-serve", _extra("serve"), ("uvicorn",), ("uvicorn",)),
        Package("Prometheus client", "medusa-serve", _extra("serve"), ("prometheus_client",), ("prometheus-client",)),
        Package("llguidance", "JSON and grammars in medusa-serve", _extra("serve"), ("llguidance",), ("llguidance",)),
        Package("Triton client", "medusa-triton", _extra("triton"), ("tritonclient",), ("tritonclient",)),
        Package(
            "Triton server", "serving its repositories", "NVIDIA's container nvcr.io/nvidia/tritonserver", program="tritonserver",
            folder="/opt/tritonserver/bin",
        ),
        Package("PEFT", "training with LoRA", _extra("train"), ("peft",), ("peft",)),
        Package("matplotlib", "pictures of training and trees", _extra("train"), ("matplotlib",), ("matplotlib",)),
        Package("TensorBoard", "curves of training", _extra("train"), ("tensorboard",), ("tensorboard",)),
        Package("openai", "medusa-data from servers", _extra("data"), ("openai",), ("openai",)),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What was found of one package.

    Attributes:
        version: None where nobody says.
        is_here: whether it is installed.
        problem: the last line of the error that its import ends with; "" where it imports, or was not tried.
    """

    version: str | None
    is_here: bool
    problem: str = ""

    @property
    def works(self) -> bool:
        """Whether it can be used, as far as was looked."""
        return self.is_here and not self.problem


def find_packages(
    packages: Iterable[Package] = tuple(PACKAGES.values()),
    *,
    imports: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Found]:
    """Look for packages.

    Args:
        packages: rows to look for.
        imports: import what is installed, each in a process of its own; otherwise only look whether it is there.
        progress: called with how many are done, of how many.

    Returns:
        what was found, by the name of the row.
    """
    rows = list(packages)
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1))) as pool:
        found = {}
        for row, each in zip(rows, pool.map(lambda row: _find(row, imports=imports), rows), strict=True):
            found[row.name] = each
            progress(len(found), len(rows))
    return found


def _find(row: Package, *, imports: bool) -> Found:
    if row.program:
        found = shutil.which(row.program) or shutil.which(row.program, path=row.folder)
        return Found(None, found is not None)
    present = [name for name in row.modules if _is_installed(name)]
    if not present:
        return Found(None, False)
    return Found(_version(row.distributions), True, _import_problem(present) if imports else "")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a test's None in sys.modules, or a package that breaks as it is looked at
        return False


def _version(distributions: Iterable[str]) -> str | None:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # under another name
    return None


def _import_problem(modules: list[str]) -> str:
    """What the import of the first module that imports says: nothing; of none, the last line of the last error."""
    problem = ""
    for module in modules:
        problem = _problem_of(module)
        if not problem:
            return ""
    return problem


def _problem_of(module: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", f"import {module}"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return f"its import takes more than {TIMEOUT:.0f} s"
    if result.returncode == 0:
        return ""
    lines = result.stderr.strip().splitlines()
    return lines[-1].strip() if lines else f"its import ends with exit code {result.returncode}"
