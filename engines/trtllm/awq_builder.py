"""Lets ``trtllm-build`` build Medusa engines with INT4 AWQ weights: an export holds a copy of it as awq/sitecustomize.py.

TensorRT-LLM's Medusa class quantizes the base twice, once as itself and once as what it wraps, and the second time reads
``use_int8_weight``, which the group-wise layers never store: AttributeError (seen on 0.15; the code read is the same up to 1.2.1).
False is what these formats are. Python imports sitecustomize when it starts, so every process of the builder has the attribute.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

MODULE = "tensorrt_llm.quantization.layers"
LAYERS = ("WeightOnlyGroupwiseQuantLinear", "WeightOnlyGroupwiseQuantRowLinear")


class Finder:
    """Finds the module as Python does, and completes its classes once it has run."""

    @staticmethod
    def find_spec(
        name: str, path: Any = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """As ``importlib.abc.MetaPathFinder``."""
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name == MODULE else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            complete(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def complete(module: ModuleType) -> None:
    """Give the group-wise layers the attribute that the second pass reads."""
    for name in LAYERS:
        getattr(module, name).use_int8_weight = False


def run_other(name: str, here: Path) -> None:
    """Run the sitecustomize that this one stands before, if there is one."""
    others = [place for place in sys.path if Path(place or ".").resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec(name, others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if __name__ == "sitecustomize":
    sys.meta_path.insert(0, Finder)  # a class with the method is a finder
    run_other(__name__, Path(__file__).resolve().parent)
