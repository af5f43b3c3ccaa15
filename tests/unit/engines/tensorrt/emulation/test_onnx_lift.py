"""Graphs that ONNX Runtime's CPU kernels do not take, lifted: bfloat16 exactly, NVFP4 by its definition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medusa_export.engines.tensorrt.emulation.onnx_device import OnnxGraph
from medusa_export.engines.tensorrt.emulation.onnx_lift import lifted
from medusa_export.exporter.onnx.builder import GraphBuilder
from medusa_export.exporter.onnx.portable.linear import ONNX_DTYPE, PortableLinear
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.quantize.scales import Scales

MODULE = "model.layers.0.mlp.down_proj"
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
X = torch.randn(5, 80, generator=torch.Generator().manual_seed(0))


def nvfp4(x: torch.Tensor, whole: float) -> torch.Tensor:
    """Blocks of 16 under an FP8 scale in units of ``whole``; the nearest of the 8 magnitudes, by search."""
    blocks = x.unflatten(1, (-1, 16))
    scale = (blocks.abs().amax(-1, keepdim=True) / (6 * whole)).to(torch.float8_e4m3fn).float() * whole
    nearest = VALUES[((blocks / scale).abs()[..., None] - VALUES).abs().argmin(-1)]
    return (nearest * blocks.sign() * scale).flatten(1)


@pytest.fixture
def product(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Callable[..., Any]:
    """``product(form, dtype) -> (the weight, the product of X with it by the lifted graph)``."""

    def run(form: str, dtype: torch.dtype) -> Any:
        checkpoint = MedusaCheckpoint.open_base(tiny_checkpoint(tmp_path / "model"))
        weight = checkpoint.read(f"{MODULE}.weight")
        scales = Scales({MODULE: float(X.abs().max())}, {MODULE: float(weight.abs().max())})
        linear = PortableLinear(checkpoint, form, dtype, scales)
        with GraphBuilder(tmp_path / "linear.onnx", "linear", opsets=linear.opsets) as graph:
            graph.input("x", ONNX_DTYPE[dtype], ["S", 80])
            graph.node("Identity", [linear(graph, "x", [MODULE])], ["y"])
            graph.output("y", ONNX_DTYPE[dtype], ["S", "N"])
        loaded = OnnxGraph(tmp_path / "linear.onnx")
        buffers = {"x": X.to(dtype).to(loaded.dtype("x")), "y": torch.zeros(5, 64, dtype=loaded.dtype("y"))}
        loaded.bind(buffers, 0, fixed=False)()
        return weight, buffers["y"].float()

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nvfp4(dtype: torch.dtype, product: Callable[..., Any]) -> None:
    weight, y = product("nvfp4", dtype)
    whole = [float(tensor.abs().max()) / (6 * 448) for tensor in (X, weight)]
    wanted = nvfp4(X.to(dtype).float(), whole[0]) @ nvfp4(weight, whole[1]).T
    far = (y - wanted).abs() > 1e-3 * float(wanted.abs().max())
    assert float(far.float().mean()) < (0.02 if dtype == torch.float32 else 0.2), (
        "a tie of the rounding may fall either way"
    )
    exact = X @ weight.T
    assert 0.02 < float((wanted - exact).pow(2).mean() / exact.pow(2).mean()) ** 0.5 < 0.2


def test_bfloat16_is_float32_on_the_same_numbers(product: Callable[..., Any]) -> None:
    weight, y = product("float", torch.bfloat16)
    wanted = X.bfloat16().float() @ weight.bfloat16().float().T
    np.testing.assert_allclose(y, wanted, atol=1e-5)


def test_other_graphs_stay_as_they_are(product: Callable[..., Any], tmp_path: Path) -> None:
    product("int4", torch.float16)
    assert lifted(tmp_path / "linear.onnx") is None
