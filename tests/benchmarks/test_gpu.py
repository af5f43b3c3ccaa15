"""benchmarks/gpu.py at a small size on a CPU, in an environment like a GPU machine's: nothing installed that it does not need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"
ABSENT = ("modelopt", "typer", "rich", "platformdirs", "tensorrt_rtx", "tensorrt_rtx_bindings", "tensorrt", "openai")


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment in which these packages cannot be imported, nor this project but from its folder."""
    folder = tmp_path / "absent"
    folder.mkdir()
    for name in ABSENT:
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is not here')\n")
    lines = ["import sys", "sys.meta_path[:] = [each for each in sys.meta_path if '__editable__' not in str(each)]"]
    lines += ["sys.path[:] = [each for each in sys.path if '__editable__' not in each]"]
    (folder / "sitecustomize.py").write_text("\n".join(lines) + "\n")
    return {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}


def test_small(
    tiny_checkpoint: Callable[..., Path], tiny_heads: Callable[..., Path], tiny_tokenizer: Callable[..., Path],
    predictable: Callable[..., None], tmp_path: Path, bare: dict[str, str],
) -> None:  # fmt: skip
    model = tiny_tokenizer(tiny_checkpoint(tmp_path / "model", max_position_embeddings=256))
    heads = tiny_heads(tmp_path / "heads", num_heads=4)
    predictable(model, heads)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"w{n} w{n + 1}", "category": "a"}) + "\n" for n in range(16)))
    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), "--ckpt", str(model), "--heads", str(heads), "--prompts", str(prompts)]
    command += [
        "--calib",
        str(prompts),
        "--output",
        str(out),
        "--dtype",
        "float32",
        "--place",
        "cpu",
        "--shape",
        "tiny",
    ]
    command += ["--max-new-tokens", "8", "--repeats", "1", "--rounds", "1", "--calib-prompts", "4", "--quant", "none"]
    result = subprocess.run([*command, "--quant", "fp8"], env=bare, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    body = json.loads((out / "gpu.json").read_text())
    assert list(body["parts"]) == [
        "tensorrt_rtx", "engine none", "engine fp8", "ptq", "shape tiny none", "shape tiny fp8",
    ]  # fmt: skip
    assert body["parts"]["tensorrt_rtx"] == {"skipped": "tensorrt_rtx is not installed"}
    assert body["bandwidth_gb_s"] > 0
    _engines(body["parts"])
    ptq = body["parts"]["ptq"]
    assert ptq["largest_amax_difference"] == 0, "here both sides are this CPU"
    assert ptq["fp8_products"] == 10
    assert ptq["greedy_agreement"] > 0.9
    assert ptq["kl_device_to_cpu"] < 0.2 * ptq["kl_checkpoint_to_cpu"] + 1e-3, (
        "FP8 products are what rounding says they are"
    )
    assert result.stdout == (out / "gpu.md").read_text()
    rows = [line.split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]
    assert ["| tensorrt_rtx", "skipped", "tensorrt_rtx is not installed |"] in rows
    assert {row[0] for row in rows[1:]} == {f"| {name}" for name in body["parts"]}


def _engines(parts: dict[str, Any]) -> None:
    for quant in ("none", "fp8"):
        found = parts[f"engine {quant}"]
        parity = found["report"]["parity"]
        assert (parity["exact"] + parity["ties"], parity["mismatches"]) == (3, 0), "13 of 16 prompts choose the tree"
        assert found["report"]["tokens_per_step"] > 1.5, "heads that draft well"
        assert [row["nodes"] for row in found["costs"]["curve"]["verify"]][-1] == 64
        assert found["acceptance"]["heads"][0]["top1"] > 0.8
        assert found["costs"]["over_floor"] > 1
        costs = parts[f"shape tiny {quant}"]["costs"]
        assert costs["floor_ms"] > 0
    held = [parts[f"engine {quant}"]["costs"]["weight_bytes"] for quant in ("none", "fp8")]
    assert held[1] < held[0]
    assert parts["engine fp8"]["linears"].startswith("10 FP8 products a step by the device, 0 as float32")


def test_a_part_that_fails_is_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu
    from gpu_setup import SkippedError

    def fails() -> dict[str, Any]:
        raise RuntimeError("CUDA error: no kernel image\nmore of it")

    def skips() -> dict[str, Any]:
        raise SkippedError("no GPU")

    assert gpu.attempt(fails) == {"failed": "RuntimeError: CUDA error: no kernel image more of it"}
    assert gpu.attempt(skips) == {"skipped": "no GPU"}
    body = {
        "hardware": {"gpus": ["H100"]}, "place": "cuda", "date": "2026-01-01", "model": "m", "dtype": "float16", "versions": {},
        "bandwidth_gb_s": 3000.0, "parts": {"ptq": {"failed": "a | b"}},
    }  # fmt: skip
    assert gpu.markdown(body).splitlines()[-1] == "| ptq | failed | a / b |"


def test_bad_input_is_one_line(tmp_path: Path, bare: dict[str, str]) -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        "--ckpt",
        str(tmp_path / "nowhere"),
        "--place",
        "cpu",
        "--output",
        str(tmp_path / "o"),
    ]
    result = subprocess.run(command, env=bare, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert not (tmp_path / "o").exists()
