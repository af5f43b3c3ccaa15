"""The QAT benchmark on a tiny model: it runs, its rows are measured apart, and what is given back is computed from them."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "qat.py"


def _module() -> Any:
    spec = importlib.util.spec_from_file_location("qat_benchmark", BENCHMARK)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_share_of_the_loss_that_is_given_back() -> None:
    qat = _module()
    rows = {
        qat.FULL: {"perplexity": 2.0, "head0_top1": 0.5, "heads_top1": 0.4},
        qat.ROUNDED: {"perplexity": 3.0, "head0_top1": 0.4, "heads_top1": 0.2},
        qat.TRAINED: {"perplexity": 2.25, "head0_top1": 0.45, "heads_top1": 0.2},
    }
    found = qat.recovered(rows, qat.TRAINED)
    assert found == pytest.approx({"perplexity": 0.75, "head0_top1": 0.5, "heads_top1": 0.0})
    rows[qat.ROUNDED]["head0_top1"] = 0.5
    assert math.isnan(qat.recovered(rows, qat.TRAINED)["head0_top1"])  # nothing was lost


def test_small(
    tiny_checkpoint: Callable[..., Path],
    tiny_tokenizer: Callable[..., Path],
    tiny_heads: Callable[..., Path],
    tmp_path: Path,
) -> None:
    model = tiny_tokenizer(tiny_checkpoint(tmp_path / "model", head_dim=16))
    heads = tiny_heads(tmp_path / "heads", "v2", 2)
    rng = random.Random(0)
    data = tmp_path / "data.jsonl"
    with data.open("w") as file:
        for _ in range(12):
            said = [" ".join(f"w{rng.randrange(80)}" for _ in range(10)) for _ in range(2)]
            messages = [{"role": r, "content": text} for r, text in zip(("user", "assistant"), said, strict=True)]
            file.write(json.dumps({"messages": messages, "finish_reason": "stop"}) + "\n")
    (tmp_path / "work").mkdir()
    result = subprocess.run(
        [sys.executable, BENCHMARK, "--ckpt", model, "--heads", heads, "--data", data, "--held-out", data, "--steps", "3",
         "--batch-size", "2", "--min-answer", "2", "--measured", "4", "--learning-rate", "0.01", "--work", tmp_path / "work",
         "--json", tmp_path / "figures.json"],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert os.listdir(tmp_path / "work") == []
    body = json.loads((tmp_path / "figures.json").read_text())
    rows = body["rows"]
    assert list(rows) == ["16 bit", "rounded", "trained", "trained, heads as before"]
    assert len({row["perplexity"] for row in rows.values()}) == 3  # both trained rows have one base
    assert rows["trained"]["perplexity"] == rows["trained, heads as before"]["perplexity"]
    assert body["held_out_tokens"] == 4 * 11
    assert "44 held-out tokens" in result.stdout
