"""The machine that figures come from: its CPU, its GPUs, and the packages that matter."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from medusa_export.heads.contract.engine_info import EngineInfo

PACKAGES = ("medusa-export", "onnxruntime", "numpy", "transformers", "torch", "tensorrt_llm", "tensorrt")
GPU_BACKENDS = ("tensorrt", "tensorrt-llm")


def hardware() -> dict[str, Any]:
    """CPU, cores this process may use, and memory in GiB."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {"cpu": name, "cores": cores, "memory_gib": round(memory / 2**30, 1), "system": platform.system()}


def device_name(info: EngineInfo, num_gpus: int = 1) -> str:
    """What the engine runs on, for people: the cores, or the GPUs as torch names them; never the cores of a GPU's engine."""
    machine = hardware()
    if info.backend not in GPU_BACKENDS:
        return f"{machine['cores']} cores of {machine['cpu']}"
    found = gpus()
    if not found:
        return "a GPU whose name is unknown"
    return f"{num_gpus} x {found[0]}" if num_gpus > 1 else found[0]


def gpus() -> list[str]:
    """Names of the GPUs that torch sees; none where torch is not installed or sees none."""
    try:
        import torch
    except ImportError:
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def versions() -> dict[str, str]:
    """Python and the packages that matter, as far as installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional package: its absence is a fact about this installation, not an error
    return found
