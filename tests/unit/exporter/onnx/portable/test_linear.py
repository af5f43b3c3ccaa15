"""Every form of the portable graph's linears, run by ONNX Runtime, against its definition in float32 PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medusa_export.exporter.onnx.builder import GraphBuilder
from medusa_export.exporter.onnx.portable.linear import ONNX_DTYPE, PORTABLE_FORMS, PortableLinear

GROUP = 32
QKV = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
GATE, UP = (f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up"))
X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * 0.5


def to_fp8(x: torch.Tensor, scale: Any) -> torch.Tensor:
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def to_int(x: torch.Tensor, scale: Any, top: int) -> torch.Tensor:
    return (x / scale).round().clamp(-top - 1, top) * scale


def by_row(w: torch.Tensor) -> torch.Tensor:
    return w.abs().amax(dim=1, keepdim=True)


def by_group(w: torch.Tensor, size: int) -> torch.Tensor:
    return w.unflatten(1, (-1, size)).abs().amax(dim=-1).repeat_interleave(size, dim=1)


# (weight, largest magnitude of the tensor) -> what the stored weight stands for; and the same for inputs.
WEIGHTS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "float": lambda w, amax: w,
    "fp8": lambda w, amax: to_fp8(w, amax / 448),
    "fp8_row": lambda w, amax: to_fp8(w, by_row(w) / 448),
    "int8_sq": lambda w, amax: to_int(w, by_row(w) / 127, 127),
    "int8": lambda w, amax: to_int(w, by_row(w) / 127, 127),
    "int4": lambda w, amax: to_int(w, by_group(w, 32) / 7, 7),
    "int4_awq": lambda w, amax: to_int(w, by_group(w, GROUP) / 7, 7),
}
INPUTS: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "fp8": lambda x, amax: to_fp8(x, amax / 448),
    "int8_sq": lambda x, amax: to_int(x, amax / 127, 127),
}


def expected(case: Any, form: str, modules: list[str], fused: list[str]) -> torch.Tensor:
    """[5, N]"""
    smooths = form in ("int8_sq", "int4_awq")
    factor = case.scales.pre_quant_scale[modules[0]] if smooths else torch.ones(64)
    fused = modules if smooths else fused
    weight_amax, input_amax = (
        max(getattr(case.scales, kind)[name] for name in fused) for kind in ("weight_amax", "input_amax")
    )
    x = INPUTS.get(form, lambda x, amax: x)(X * factor, input_amax)
    weights = [WEIGHTS[form](case.checkpoint.read(f"{name}.weight").float() / factor, weight_amax) for name in modules]
    biases = [case.checkpoint.read(f"{name}.bias").float() for name in modules if name in QKV]
    return x @ torch.cat(weights).T + (torch.cat(biases) if biases else 0)


@pytest.fixture
def product(make_case: Callable[..., Any], open_session: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """``product(form, modules, scale_with, dtype) -> (case, what a graph of that linear alone gives)``."""

    def run(
        form: str, modules: list[str], scale_with: list[str], dtype: torch.dtype = torch.float32, **linear: Any
    ) -> Any:
        case = make_case("qwen2", dtype=torch.float32)
        add = PortableLinear(case.checkpoint, form, dtype, case.scales, GROUP if form == "int4_awq" else None, **linear)
        with GraphBuilder(tmp_path / "linear.onnx", "linear", opsets=add.opsets) as graph:
            graph.input("x", ONNX_DTYPE[dtype], ["S", 64])
            graph.node("Identity", [add(graph, "x", modules, scale_with=scale_with)], ["y"])
            graph.output("y", ONNX_DTYPE[dtype], ["S", "N"])
        session = open_session(tmp_path / "linear.onnx", optimize=False)
        (y,) = session.run(None, {"x": X.to(dtype).numpy()})
        return case, torch.from_numpy(y).float()

    return run


@pytest.mark.parametrize("form", WEIGHTS)
@pytest.mark.parametrize(("modules", "scale_with"), [(QKV, []), ([GATE], [UP])], ids=["qkv", "gate"])
def test_forms(form: str, modules: list[str], scale_with: list[str], product: Callable[..., Any]) -> None:
    case, y = product(form, modules, scale_with)
    wanted = expected(case, form, modules, [*modules, *scale_with])
    np.testing.assert_allclose(y, wanted, atol=2e-4 * float(wanted.abs().max()), rtol=0)
    if form != "float":
        exact = expected(case, "float", modules, modules)
        error = float((wanted - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt())
        assert 0 < error < 0.2, "a form that rounds, and is still the product"


@pytest.mark.parametrize("form", [form for form in WEIGHTS if form != "float"])
def test_16_bit_scales_lose_little(form: str, product: Callable[..., Any]) -> None:
    """Scales are rounded to 16 bit; the codes are made for the rounded ones, so the product stays what it was up to rounding."""
    case, y = product(form, QKV, [], torch.float16)
    exact, wanted = expected(case, "float", QKV, QKV), expected(case, form, QKV, QKV)
    size = float(exact.pow(2).mean().sqrt())
    error, own = (float((found - exact).pow(2).mean().sqrt()) / size for found in (y, wanted))
    assert error < 1.1 * own + 2e-3


def test_excluded_linears_stay(product: Callable[..., Any]) -> None:
    case, y = product("int4", QKV, [], excluded=lambda module: module.endswith("q_proj"))
    np.testing.assert_allclose(y, expected(case, "float", QKV, QKV), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_scales_are_never_smaller(dtype: torch.dtype, make_case: Callable[..., Any]) -> None:
    linear = PortableLinear(make_case().checkpoint, "float", dtype)
    scales = torch.rand(2000, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.arange(-6, 2).repeat(250)
    rounded = linear.rounded(scales)
    assert rounded.dtype == dtype
    assert bool((rounded.float() >= scales).all())
    assert float((rounded.float() / scales)[scales > 1e-4].max()) < 1 + 2 * torch.finfo(dtype).eps


def test_every_form_has_a_definition_here() -> None:
    assert PORTABLE_FORMS.keys() - WEIGHTS.keys() == {"nvfp4"}, "see test_onnx_lift"
