"""Small exports to check: a random checkpoint with heads, made-up scales and one function that writes them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_export.exporter.write.trtllm import write_trtllm
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.trees.tree import Tree
from medusa_export.quantize.formats import get_format
from medusa_export.quantize.scales import Scales

TREE = Tree.from_choices([[0], [1], [0, 0]])


@dataclass
class Case:
    """A checkpoint on disk and what was read of it."""

    model_dir: Path
    checkpoint: MedusaCheckpoint
    scales: Scales

    def edit(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        """Change the base model's tensors in their file, and open it again."""
        file = self.model_dir / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})
        self.checkpoint = MedusaCheckpoint.open(self.model_dir, self.checkpoint.heads.source.path)

    def write(self, out: Path, weight_format: str = "none", **options: Any) -> Path:
        """``write_trtllm`` with a small tree and this case's scales."""
        form = get_format(weight_format, options.pop("group_size", None))
        write_trtllm(out, self.checkpoint, form, self.scales, **{"tree": TREE, **options})
        return out


def scales_of(checkpoint: MedusaCheckpoint) -> Scales:
    """True weight maxima, and made-up ones of what only a calibration can measure."""
    linears = [name for name in checkpoint.names if name.endswith(".weight") and len(checkpoint.shape(name)) == 2]
    modules = [name.removesuffix(".weight") for name in linears]
    weight_amax = {module: float(checkpoint.read(f"{module}.weight").abs().max()) for module in modules}
    input_amax = {module: 3.0 + 0.25 * index for index, module in enumerate(modules)}
    kv_amax = {layer: 100.0 + 500 * layer for layer in range(checkpoint.config.num_hidden_layers)}
    smoothing = {
        module: torch.linspace(0.5, 2.0, checkpoint.shape(f"{module}.weight")[1]).roll(index)
        for index, module in enumerate(_one_of_fused(modules))
    }
    return Scales(input_amax, weight_amax, kv_amax, {module: smoothing[_representative(module)] for module in modules})


def _representative(module: str) -> str:
    """The first of linears that are fused or have the same input: q for k and v, gate for up."""
    return module.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")


def _one_of_fused(modules: list[str]) -> list[str]:
    return [module for module in modules if module == _representative(module)]


@pytest.fixture
def make_case(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], tiny_heads: Callable[..., Path]
) -> Callable[..., Case]:
    """``make_case(family="llama", layout="v1", num_heads=2, num_layers=1, *, dtype, **config) -> Case``."""

    def make(
        family: str = "llama",
        layout: str = "v1",
        num_heads: int = 2,
        num_layers: int = 1,
        *,
        dtype: torch.dtype = torch.float16,
        **config: Any,
    ) -> Case:
        model = tiny_checkpoint(tmp_path / "model", family, dtype=dtype, **config)
        sizes = {"hidden": config.get("hidden_size", 64), "vocab": config.get("vocab_size", 97), "dtype": dtype}
        heads = tiny_heads(tmp_path / "heads", layout, num_heads, num_layers, **sizes)
        checkpoint = MedusaCheckpoint.open(model, heads)
        return Case(model, checkpoint, scales_of(checkpoint))

    return make


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """The commands' entry points take SIGINT and SIGTERM over."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
