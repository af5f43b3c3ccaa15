"""Quantization-aware training on tiny models: what is rounded, what is stored, and that the export rounds the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medusa_export.core.errors import CheckpointError, ConfigError
from medusa_export.exporter.onnx import matrices
from medusa_export.exporter.verify.rebuild import rebuild_hf
from medusa_export.exporter.write.trtllm import write_trtllm
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint, load_reference
from medusa_export.heads.training.dataset import Example
from medusa_export.heads.training.full.arguments import ReferenceArguments
from medusa_export.heads.training.full.model import build
from medusa_export.heads.training.full.output import write_output
from medusa_export.heads.trees.tree import Tree
from medusa_export.quantize import numerics as codes
from medusa_export.quantize import qat
from medusa_export.quantize.format_facts import INT4_BLOCKS, QAT_TARGETS, NotOffered
from medusa_export.quantize.formats import FORMATS
from medusa_export.quantize.qat import QatArguments, Quantizers, effective_weight, train_qat
from medusa_export.quantize.scales import SCALES_FILE, Scales

Writer = Callable[..., Path]
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 1}
FULL = ReferenceArguments(
    base="joint", heads=1, lora_rank=0, max_steps=4, batch_size=4, log_every=1, report_to=(), warmup=0, warmup_heads=0
)
TEXTS = [list(range(40)), list(range(40, 90))]
TRAINED = [name for name, row in FORMATS.items() if not isinstance(row.qat, NotOffered)]
BOTH = [(name, target) for name in TRAINED for target in QAT_TARGETS if target == "trtllm" or name.endswith("_wo")]


def examples(count: int, seed: int = 0) -> list[Example]:
    rng, found = random.Random(seed), []
    for _ in range(count):
        prompt, answer = rng.randint(3, 8), rng.randint(4, 20)
        ids = [rng.randrange(97) for _ in range(prompt + answer)]
        found.append(Example(ids, [False] * prompt + [True] * answer))
    return found


@pytest.fixture
def model_dir(tiny_checkpoint: Writer, tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model", dtype=torch.bfloat16, **WIDE)


def quantizers(model_dir: Path, name: str, target: str = "trtllm") -> Quantizers:
    weight_format, rounding = QatArguments(name, target=target).check()
    return Quantizers(weight_format, rounding, TEXTS, model_dir, trains_base=True)


def disturb(model: Any) -> None:
    """What a training does: every weight that is trained moves, here far beyond the largest one."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "layers" in name:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_(noise * parameter.abs().max().clamp_min(0.02) * 0.5)


def projections(model: Any) -> dict[str, Any]:
    return dict(qat.quantized_linears(model))


def rounded(linear: Any, weight: torch.Tensor) -> torch.Tensor:
    """What the model multiplies with, in the numbers of the unsmoothed weight."""
    factor = linear.input_quantizer.pre_quant_scale
    factor = torch.ones(1) if factor is None else factor
    with torch.no_grad():
        found = weight / factor
        for stage in qat.weight_quantizers(linear):
            found = stage(found)
        return found * factor


@pytest.mark.slow
@pytest.mark.parametrize(("name", "target"), BOTH)
def test_the_export_rounds_as_the_training_did(name: str, target: str, model_dir: Path, tmp_path: Path) -> None:
    """Whatever the weights have become: scales would be stale if they were those of the calibration."""
    lora = 0 if FORMATS[name].smooths else 4
    arguments = replace(FULL, lora_rank=lora)
    extension = quantizers(model_dir, name, target)
    built = build(model_dir, arguments, extension=extension)
    built.module(arguments, freeze_base=False)
    disturb(built.model)
    built.merge()
    (tmp_path / "out").mkdir()
    extension.finish(built.model, tmp_path / "out")
    assert write_output(built.model, model_dir, tmp_path / "out", arguments) > 0.01
    stored = load_file(tmp_path / "out" / "model.safetensors")
    trained = {
        key: rounded(linear, stored[f"{key}.weight"].float()) for key, linear in projections(built.model).items()
    }
    assert len(trained) == 7
    for key, found in _deployed(tmp_path / "out", name, target, stored).items():
        step = float((trained[key] - stored[f"{key}.weight"].float()).abs().max())
        assert step > 0
        differs = (found - trained[key]).abs() > 0.02 * step + 0.004 * found.abs()  # factors are stored in bfloat16
        assert float(differs.float().mean()) < 0.002, key  # ties round either way; with stale scales most would differ


def _deployed(out: Path, name: str, target: str, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the engine will multiply with, by module."""
    modules = [key.removesuffix(".weight") for key in stored if key.endswith("_proj.weight")]
    if name.endswith("_wo"):
        bits, found = {"int8_wo": 8, "int4_wo": 4}[name], {}
        for module in modules:
            weight = stored[f"{module}.weight"].float()
            if target == "trtllm":  # trtllm-build: symmetric_quantize_last_axis_of_batched_matrix
                scale = weight.abs().amax(1, keepdim=True) / 2 ** (bits - 1)
                found[module] = (weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
            elif bits == 8:
                values, scale = matrices.quantize_int8_blocks(weight, module)
                scale = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
                found[module] = (values.float() - 128) * scale
            else:
                block = matrices.block_of(weight.shape[1], module, INT4_BLOCKS)
                scale = codes.group_scales(weight, block).repeat_interleave(block, dim=1)
                found[module] = codes.int4_groups(weight, block) * scale
        return found
    weight_format = FORMATS[name]
    scales = Scales.load(out / SCALES_FILE) if weight_format.needs_calibration else None
    write_trtllm(out / "trtllm", MedusaCheckpoint.open(out), weight_format, scales, tree=Tree.from_choices([(0,)]))
    rebuilt = rebuild_hf(out / "trtllm")
    return {module: rebuilt[f"{module}.weight"] for module in modules}


def test_blocks_are_the_exporters() -> None:
    for name in ("int8_wo", "int4_wo"):
        row = FORMATS[name]
        assert not isinstance(row.qat, NotOffered)
        assert row.onnxruntime is not None
        assert row.qat["onnx"].blocks == row.onnxruntime.codes.blocks != ()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TRAINED))
def test_every_format_trains(name: str, model_dir: Path, tmp_path: Path) -> None:
    """On the CPU: gradients pass the rounding, the base moves, and scales are written where the export takes any."""
    weight_format = FORMATS[name]
    arguments = replace(FULL, lora_rank=0 if weight_format.smooths else 4, learning_rate=1e-3)
    report = train_qat(model_dir, examples(8), tmp_path / "out", arguments, QatArguments(name), held_out=examples(3, 1))
    assert report.base_change > 1e-4
    assert (tmp_path / "out" / SCALES_FILE).exists() is weight_format.needs_calibration
    opened = MedusaCheckpoint.open(tmp_path / "out")
    assert opened.heads.layout == "medusa-v2"
    assert not any("quantizer" in key or "lora" in key for key in load_file(tmp_path / "out" / "model.safetensors"))
    if weight_format.needs_calibration:
        scales = Scales.load(tmp_path / "out" / SCALES_FILE)
        assert all("layers.0" in module for module in scales.input_amax)  # heads stay in 16 bit
        write_trtllm(tmp_path / "trtllm", opened, weight_format, scales, tree=Tree.from_choices([(0,)]))


@pytest.mark.slow
def test_heads_alone_learn_on_the_quantized_base(model_dir: Path, tmp_path: Path) -> None:
    arguments = replace(FULL, base="frozen", layout="v1")
    report = train_qat(
        model_dir, examples(8), tmp_path / "out", arguments, QatArguments("fp8"), held_out=examples(3, 1)
    )
    plain = train_qat(
        model_dir, examples(8), tmp_path / "other", arguments, QatArguments("int4_wo"), held_out=examples(3, 1)
    )
    assert report.base_change == 0.0
    assert report.metrics["base_nll"] != plain.metrics["base_nll"]  # both are of rounded models
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"medusa_lm_head.safetensors", "config.json", SCALES_FILE}
    scales = Scales.load(tmp_path / "out" / SCALES_FILE)
    weight = load_file(model_dir / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert scales.weight_amax["model.layers.0.mlp.up_proj"] >= float(weight.abs().max())
    checkpoint = MedusaCheckpoint.open(model_dir, tmp_path / "out")
    write_trtllm(tmp_path / "trtllm", checkpoint, FORMATS["fp8"], scales, tree=Tree.from_choices([(0,)]))


@pytest.mark.slow
def test_distillation_brings_the_base_back(model_dir: Path, tmp_path: Path) -> None:
    """The same model, rounded to INT4 without and with training: its distance from itself in full precision."""
    common = replace(FULL, max_steps=40, batch_size=8, heads_weight=1e-3, log_every=100)
    found = []
    for number, rate in enumerate((1e-5, 3e-4)):  # the first one hardly moves
        report = train_qat(
            model_dir, examples(256), tmp_path / f"out{number}", replace(common, learning_rate=rate),
            QatArguments("int4_wo"), held_out=examples(16, 1),
        )  # fmt: skip
        found.append(report.metrics["base_kl"])
    assert found[1] < 0.9 * found[0]


def test_trap_modelopts_scales_stay_behind(model_dir: Path) -> None:
    """Without ``refresh`` the maxima are those of the first step, and the exporter refuses larger weights."""
    arguments = replace(FULL, lora_rank=0)
    built = build(model_dir, arguments, extension=quantizers(model_dir, "fp8"))
    linear = projections(built.model)["model.layers.0.mlp.down_proj"]
    before = float(linear.weight_quantizer.amax)
    with torch.no_grad():
        linear.weight.mul_(2)
        linear(torch.zeros(1, 256))
        assert float(linear.weight_quantizer.amax) == before
        built.model.model(input_ids=torch.tensor([[1, 2]]))
    assert float(linear.weight_quantizer.amax) == 2 * before


def test_trap_lora_beside_a_rounded_weight(model_dir: Path) -> None:
    """round(W) + BA is not what can be deployed: it is round(W + BA)."""
    built = build(model_dir, replace(FULL, lora_rank=4), extension=quantizers(model_dir, "int4_wo"))
    linear = projections(built.model)["model.layers.0.mlp.up_proj"]
    with torch.no_grad():
        linear.lora_B["default"].weight.normal_()
        built.model.model(input_ids=torch.tensor([[1, 2]]))  # takes the scales of the sum
        x = torch.randn(3, 128)
        assert torch.allclose(linear(x), x @ rounded(linear, effective_weight(linear)).T, atol=1e-4)
        with built.adapters.disable_adapter():
            assert torch.allclose(linear(x), x @ linear.base_layer.weight.T)  # the teacher is not rounded


def test_heads_and_lm_head_are_not_rounded(model_dir: Path) -> None:
    """ModelOpt would round the heads, their vocabulary projections too."""
    built = build(model_dir, replace(FULL, layout="v1"), extension=quantizers(model_dir, "fp8"))
    enabled = {name for name, module in built.model.named_modules() if getattr(module, "is_enabled", False)}
    assert {name.split(".")[2] for name in enabled} == {"0"}
    assert all(name.startswith("model.layers.") for name in enabled)
    assert len(enabled) == 2 * 7


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (
            QatArguments("none"),
            {},
            "training with none: got a format that rounds nothing; .* train without quantization",
        ),
        (QatArguments("nvfp4"), {}, "training with nvfp4: got a format that ModelOpt rounds on GPUs only"),
        (QatArguments("fp8", kv_cache="fp8"), {}, "got kv cache fp8; expected none; quantize the cache when exporting"),
        (QatArguments("fp8", target="tpu"), {}, "target: got tpu"),
        (QatArguments("fp5"), {}, "an unknown name"),
        (QatArguments("fp8"), {"layout": "modelopt"}, "layout: got modelopt"),
        (QatArguments("int4_awq"), {"lora_rank": 8}, "lora_rank: got 8; expected 0 with int4_awq"),
        (QatArguments("int4_awq"), {}, r"self_attn.q_proj: got 64 input features; expected a multiple of 128"),
    ],
)
def test_refused(
    arguments: QatArguments, changes: dict[str, Any], message: str, tiny_checkpoint: Writer, tmp_path: Path
) -> None:
    narrow = tiny_checkpoint(tmp_path / "narrow", num_hidden_layers=1)
    with pytest.raises(ConfigError, match=message):
        train_qat(narrow, examples(2), tmp_path / "out", replace(FULL, **changes), arguments)
    assert not (tmp_path / "out").exists()


def test_broken_weights(model_dir: Path) -> None:
    model = load_reference(model_dir, torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(model_dir)
    with pytest.raises(CheckpointError, match="cannot be calibrated"):
        build(model_dir, FULL, extension=quantizers(model_dir, "fp8"))
