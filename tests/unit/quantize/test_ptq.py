"""Calibration with ModelOpt on tiny models."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_export.core.errors import CheckpointError, ConfigError, MissingPackageError
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint, load_reference
from medusa_export.quantize.formats import get_format
from medusa_export.quantize.ptq import calibrate

BATCHES = [list(range(12)), list(range(40, 60))]
LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LINEARS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
Writer = Callable[..., Path]


@pytest.fixture
def opened(tiny_checkpoint: Writer, tiny_heads: Writer, tmp_path: Path) -> Callable[..., tuple[Path, MedusaCheckpoint]]:
    def open_both(family: str = "llama", layout: str = "v1") -> tuple[Path, MedusaCheckpoint]:
        model = tiny_checkpoint(tmp_path / "model", family, dtype=torch.bfloat16)
        heads = tiny_heads(tmp_path / "heads", layout, num_heads=2, dtype=torch.bfloat16)
        return model, MedusaCheckpoint.open(model, heads)

    return open_both


Opened = Callable[..., tuple[Path, MedusaCheckpoint]]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_linear_gets_its_scales(family: str, opened: Opened) -> None:
    model_dir, checkpoint = opened(family)
    scales = calibrate(model_dir, checkpoint, get_format("fp8"), kv_cache="fp8", quant_heads=False, batches=BATCHES)
    modules = {f"model.layers.{layer}.{name}" for layer in range(2) for name in LINEARS}
    assert scales.input_amax.keys() == scales.weight_amax.keys() == modules
    assert scales.kv_amax.keys() == {0, 1}
    for module, amax in scales.weight_amax.items():
        assert amax == float(checkpoint.read(f"{module}.weight").abs().max())


def test_measured_maxima_are_those_of_the_model(opened: Opened) -> None:
    model_dir, checkpoint = opened()
    scales = calibrate(model_dir, checkpoint, get_format("fp8"), kv_cache="fp8", quant_heads=False, batches=BATCHES)
    seen: dict[str, float] = {}
    model = load_reference(model_dir, torch.float32)
    for name, module in model.named_modules():
        if name in scales.input_amax:
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.update({name: max(seen.get(name, 0.0), float(args[0].abs().max()))})
            )
    cached = 0.0
    with torch.no_grad():
        for ids in BATCHES:
            layer = model(torch.tensor([ids]), use_cache=True).past_key_values.layers[1]
            cached = max(cached, float(layer.keys.abs().max()), float(layer.values.abs().max()))
    assert scales.input_amax == pytest.approx(seen, rel=1e-5)
    assert scales.kv_amax[1] == pytest.approx(cached, rel=1e-5)  # keys as they are cached: rotated


@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_heads_with_their_own_weights(layout: str, opened: Opened) -> None:
    model_dir, checkpoint = opened("llama", layout)
    scales = calibrate(model_dir, checkpoint, get_format("fp8"), kv_cache="none", quant_heads=True, batches=BATCHES)
    heads = {name for name in scales.weight_amax if name.startswith("medusa_heads.")}
    assert heads == {f"medusa_heads.{head}.{part}" for head in range(2) for part in ("0.linear", "1")}
    assert all(scales.weight_amax[name] == float(checkpoint.read(f"{name}.weight").abs().max()) for name in heads)
    assert scales.kv_amax == {}


def test_smoothing(opened: Opened) -> None:
    """SmoothQuant with the format's alpha; gate and up share factors, as q, k and v do: all that one norm feeds."""
    model_dir, checkpoint = opened()
    form = get_format("int8_sq")
    scales = calibrate(model_dir, checkpoint, form, kv_cache="none", quant_heads=False, batches=BATCHES)
    layer, shared = (
        "model.layers.1",
        ("self_attn.k_proj", "self_attn.v_proj"),
    )
    for first, others in (("self_attn.q_proj", shared), ("mlp.gate_proj", ("mlp.up_proj",))):
        for other in others:
            assert torch.equal(scales.pre_quant_scale[f"{layer}.{first}"], scales.pre_quant_scale[f"{layer}.{other}"])
            assert scales.input_amax[f"{layer}.{first}"] == scales.input_amax[f"{layer}.{other}"]
    seen: list[torch.Tensor] = []
    model: Any = load_reference(model_dir, torch.float32)
    down = model.model.layers[1].mlp.down_proj
    down.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().amax((0, 1))))
    with torch.no_grad():
        for ids in BATCHES:
            model(torch.tensor([ids]))
    inputs, alpha = torch.stack(seen).amax(0), form.smoothing_alpha
    assert alpha is not None
    expected = down.weight.abs().amax(0) ** (1 - alpha) / inputs**alpha
    found = scales.pre_quant_scale[f"{layer}.mlp.down_proj"]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=0)
    assert scales.input_amax[f"{layer}.mlp.down_proj"] == pytest.approx(float((inputs * found).max()), rel=1e-3)


def test_cache_only(opened: Opened) -> None:
    model_dir, checkpoint = opened()
    scales = calibrate(model_dir, checkpoint, get_format("none"), kv_cache="fp8", quant_heads=False, batches=BATCHES)
    assert (scales.input_amax, scales.weight_amax) == ({}, {})
    assert scales.kv_amax.keys() == {0, 1}


def test_stdout_is_left_to_the_caller(opened: Opened, capsys: pytest.CaptureFixture[str]) -> None:
    model_dir, checkpoint = opened()
    calibrate(
        model_dir,
        checkpoint,
        get_format("fp8"),
        kv_cache="none",
        quant_heads=False,
        batches=BATCHES,
        progress=lambda done, total: print(f"{done} of {total}"),
    )
    assert capsys.readouterr().out == "1 of 2\n2 of 2\n"


def test_untrained_heads_are_refused(opened: Opened, tmp_path: Path) -> None:
    model_dir, _ = opened()
    path = tmp_path / "heads" / "medusa_lm_head.safetensors"
    save_file({**load_file(path), "0.0.linear.weight": torch.zeros(64, 64, dtype=torch.bfloat16)}, path)
    checkpoint = MedusaCheckpoint.open(model_dir, tmp_path / "heads")
    with pytest.raises(CheckpointError, match=r"amax of medusa_heads.0.0.linear: got 0.0"):
        calibrate(model_dir, checkpoint, get_format("fp8"), kv_cache="none", quant_heads=True, batches=BATCHES)


def test_refusals(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    model_dir, checkpoint = opened()
    for weight_format, kv_cache, quant_heads, batches, message in (
        ("fp8", "none", False, [], "calibration prompts: got none"),
        ("int8_wo", "none", False, BATCHES, "nothing to calibrate"),
        ("none", "fp8", True, BATCHES, "leave the heads in 16 bit"),
    ):
        with pytest.raises(ConfigError, match=message):
            calibrate(
                model_dir,
                checkpoint,
                get_format(weight_format),
                kv_cache=kv_cache,
                quant_heads=quant_heads,
                batches=batches,
            )
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    with pytest.raises(MissingPackageError, match=r"medusa-export\[modelopt\]"):
        calibrate(model_dir, checkpoint, get_format("fp8"), kv_cache="none", quant_heads=False, batches=BATCHES)


@pytest.mark.slow
def test_importing_loads_no_modelopt() -> None:
    code = "import sys, medusa_export.quantize.ptq; sys.exit('modelopt' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_weights_that_are_not_finite(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], tiny_heads: Callable[..., Path]
) -> None:
    model = tiny_checkpoint(tmp_path / "model", "llama")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    checkpoint = MedusaCheckpoint.open(model, tiny_heads(tmp_path / "heads", "v1", 2, 1))
    with pytest.raises(CheckpointError, match=r"finite weights|finite number"):
        calibrate(model, checkpoint, get_format("fp8"), kv_cache="none", quant_heads=False, batches=BATCHES)
