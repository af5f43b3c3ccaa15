"""The training benchmark on a tiny model: every side runs, and its figures are what was measured less the imports."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "training.py"


def _module() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_training", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def test_figures() -> None:
    training = _module()
    Run = training.Run  # noqa: N806
    runs = [Run(9.0, 5.0, 3e6), Run(2.0, 6.0, 1e6), Run(4.0, 1.0, 2e6)]
    assert training.median(runs) == Run(4.0, 5.0, 2e6)
    found = training.figures({"slow": Run(13.0, 9.0, 5e6) - Run(3.0, 1.0, 1e6), "fast": Run(2.0, 4.0, 1e6)}, 100)
    assert found["slow"]["tokens_per_second"] == 10
    assert found["fast"]["tokens_per_second"] == 50
    assert (found["fast"]["speed_ratio"], found["fast"]["cpu_ratio"], found["fast"]["peak_ratio"]) == (5, 2, 0.25)


def test_peak_is_the_programs_own() -> None:
    """Measured from a small process, as the benchmark is: one that had torch in memory would hide it."""
    code = f"import sys; sys.path.insert(0, {str(BENCHMARK.parent)!r}); import training as t\n"
    code += "for size in (1, 200_000_000): print(t.measured_run([sys.executable, '-c', f\"b'x' * {size}\"]).peak)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    small, large = map(float, result.stdout.split())
    assert small < 120e6  # what a bare interpreter takes, and less than one with torch
    assert large > 195e6


def test_small(tiny_checkpoint: Callable[..., Path], tiny_tokenizer: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_tokenizer(tiny_checkpoint(tmp_path / "model", max_position_embeddings=512))
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4 w5 w6"}]
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"messages": [{**turns[0], "content": f"w{i}"}, turns[1]]}) + "\n" for i in range(9))
    )
    result = subprocess.run(
        [sys.executable, BENCHMARK, "--ckpt", model, "--data", data, "--conversations", "6", "--epochs", "2", "--heads", "2",
         "--repeats", "1", "--case", "cached states", "--case", "kept states", "--json", tmp_path / "figures.json"],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "150"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    body = json.loads((tmp_path / "figures.json").read_text())
    assert list(body["rows"]) == ["cached states", "kept states"]
    assert body["tokens"] == 2 * 5 * 5  # epochs, conversations that are not held out, tokens of an answer with its end
    assert all(name in result.stdout for name in ("cached states", "kept states"))


@pytest.mark.parametrize("flag", ["--nonsense"])
def test_a_run_that_fails_ends_it(flag: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="ended with 2"):
        _module().measured_run([sys.executable, flag])
    capfd.readouterr()
