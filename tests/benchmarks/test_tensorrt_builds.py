"""benchmarks/tensorrt_builds.py on a tiny model: real builds by TensorRT-RTX, refused pairs, and the numbers of every form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
TEXTS = [[5 + (7 * n + 11 * word) % 90 for word in range(24)] for n in range(3)]
SIZES = {"hidden_size": 128, "intermediate_size": 256}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script as a module; its prompts are words that the tiny tokenizer has."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import tensorrt_builds

    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": " ".join(f"w{(7 * n + word) % 90}" for word in range(24))} for n in range(6)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(tensorrt_builds, "DEFAULT_CALIB", prompts)
    monkeypatch.setattr(tensorrt_builds, "check_texts", lambda ckpt, calib_prompts: TEXTS)
    return tensorrt_builds


@pytest.fixture
def model(
    tiny_checkpoint: Callable[..., Path], tiny_heads: Callable[..., Path], tiny_tokenizer: Callable[..., Path], tmp_path: Path
) -> tuple[Path, Path]:  # fmt: skip
    ckpt = tiny_tokenizer(tiny_checkpoint(tmp_path / "model", "qwen2", **SIZES))
    return ckpt, tiny_heads(tmp_path / "heads", hidden=128)


def test_builds(
    benchmark: ModuleType, model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has wheels for Linux and Windows on x86-64 only")
    figures = tmp_path / "builds.json"
    benchmark.main(*model, quant=["fp8"], gpu=[80, 89], calib_prompts=2, json_file=figures)
    refused, built = json.loads(figures.read_text())["builds"]
    assert (refused["gpus"], built["gpus"]) == ([80], [89])
    assert "--quant fp8; expected some of sm89" in refused["refused"]
    assert built["bytes"]["rank0.engine"] > 100_000
    assert built["peak_rss_kib"] > built["libraries_kib"] > 0
    assert built["onnx_bytes"] > 0
    assert "refused" in capsys.readouterr().out


def test_numbers(
    benchmark: ModuleType, model: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every form that TensorRT takes: the graph's arithmetic is that of its weights, and its weights are near the checkpoint's."""
    figures, dtypes = tmp_path / "numbers.json", ["float16", "bfloat16"]
    benchmark.main(*model, calib_prompts=2, check=True, dtype=dtypes, json_file=figures)
    rows = json.loads(figures.read_text())["numbers"]
    assert [row["dtype"] for row in rows] == dtypes * (len(rows) // 2)
    assert {row["quant"] for row in rows} == set(benchmark.ABLE)
    for row in rows:
        rounds_inputs = row["quant"] in ("fp8", "int8_sq", "nvfp4")  # one that falls the other way moves all behind it
        bound = {"float16": (0.01, 0.3), "bfloat16": (1e-5, 0.05)}[row["dtype"]][rounds_inputs]
        assert 0 < row["relative_error"] < bound, row
        assert row["own_error"] < 2e-5 or rounds_inputs
        assert row["positions"] == 72
    assert "int4_awq" in capsys.readouterr().out


def test_a_wrong_graph_is_seen(benchmark: ModuleType, model: tuple[Path, Path], tmp_path: Path) -> None:
    """The reference takes norms and embeddings from the checkpoint: with those of another one, the error is no rounding."""
    ckpt, heads = model
    good = tmp_path / "good"
    checkpoint = benchmark.MedusaCheckpoint.open(ckpt, heads)
    good.mkdir()
    benchmark.write_graphs(good, checkpoint, benchmark.get_format("int8_wo"), None, "float16", 128)
    tensors = load_file(ckpt / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * torch.linspace(0.8, 1.2, 128)
    save_file(tensors, ckpt / "model.safetensors", {"format": "pt"})
    found = benchmark.figures(good / "engine", good / "onnx", ckpt, "int8", "float16", TEXTS)
    assert found["relative_error"] > 0.02
