"""Predictions of an export against the model that it came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_export.exporter.verify.agreement import logits_agree
from medusa_export.exporter.verify.rebuild import input_forms
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.quantize.formats import get_format
from medusa_export.quantize.ptq import calibrate
from medusa_export.quantize.scales import Scales

PROMPTS = [list(range(40)), list(range(90, 50, -1))]


def calibrated(case: Any) -> Any:
    case.scales = calibrate(
        case.model_dir, case.checkpoint, get_format("fp8"), kv_cache="fp8", quant_heads=True, batches=PROMPTS
    )
    return case


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_fp8_predicts_almost_the_same(family: str, make_case: Callable[..., Any], tmp_path: Path) -> None:
    case = calibrated(make_case(family))
    out = case.write(tmp_path / "out", "fp8", tp=2, quant_heads=True, kv_cache="fp8")
    assert logits_agree(out, case.model_dir, case.checkpoint, PROMPTS) == []
    assert input_forms(out).keys() == case.scales.input_amax.keys()


def shrink_logits(case: Any) -> None:
    """Random weights make predictions that no rounding leaves alone; these are about as sure as a language model's."""
    heads = case.checkpoint.heads.source.files[0]
    for file in (case.model_dir / "model.safetensors", heads):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.shape[0] == 128 and (name == "lm_head.weight" or name[1:] == ".1.weight"):
                tensor.mul_(0.5)
        save_file(tensors, file, {"format": "pt"})
    case.checkpoint = MedusaCheckpoint.open(case.model_dir, heads)


@pytest.mark.slow
@pytest.mark.parametrize("weight_format", ["fp8_rowwise", "int8_sq", "int4_awq", "w4a8_awq", "nvfp4"])
def test_every_format_predicts_almost_the_same(
    weight_format: str, make_case: Callable[..., Any], tmp_path: Path
) -> None:
    group_size = 64 if weight_format == "int4_awq" else None
    form = get_format(weight_format, group_size)
    case = make_case(hidden_size=128, intermediate_size=128, head_dim=32, vocab_size=128, num_hidden_layers=1)
    shrink_logits(case)
    options = {"quant_heads": form.quantizes_heads, "kv_cache": "none"}
    if form.needs_calibration:
        case.scales = calibrate(case.model_dir, case.checkpoint, form, batches=PROMPTS, **options)
    out = case.write(tmp_path / "out", weight_format, group_size=group_size, **options)
    assert logits_agree(out, case.model_dir, case.checkpoint, PROMPTS) == []
    # the same file with one row of scales wrong: far off, so that the bound is no formality
    rank = out / "rank0.safetensors"
    tensors = load_file(rank)
    name = next(name for name in tensors if name.endswith(("per_channel_scale", "weights_scaling_factor")))
    scales = tensors[name].float()
    tensors[name] = scales.mul_(8).clamp_(max=448).to(tensors[name].dtype)
    save_file(tensors, rank)
    assert logits_agree(out, case.model_dir, case.checkpoint, PROMPTS) != []


def test_16_bit_predicts_the_same(make_case: Callable[..., Any], tmp_path: Path) -> None:
    case = make_case("qwen2", tie_word_embeddings=True, dtype=torch.float32)
    assert logits_agree(case.write(tmp_path / "out", tp=2), case.model_dir, case.checkpoint, PROMPTS) == []


def test_finds_saturating_activations(make_case: Callable[..., Any], tmp_path: Path) -> None:
    case = calibrated(make_case())
    shrunk = {name: amax / 30 for name, amax in case.scales.input_amax.items()}
    case.scales = Scales(shrunk, case.scales.weight_amax, case.scales.kv_amax)
    problems = logits_agree(case.write(tmp_path / "out", "fp8"), case.model_dir, case.checkpoint, PROMPTS)
    assert problems[0].startswith("base: mean KL")


def test_finds_one_bad_head(make_case: Callable[..., Any], tmp_path: Path) -> None:
    case = make_case()
    out = case.write(tmp_path / "out")
    tensors = load_file(out / "rank0.safetensors")
    tensors["medusa_heads.1.lm_head.weight"] = tensors["medusa_heads.0.lm_head.weight"].clone()
    save_file(tensors, out / "rank0.safetensors")
    problems = logits_agree(out, case.model_dir, case.checkpoint, PROMPTS)
    assert [problem.split(":")[0] for problem in problems] == ["head 1"]
