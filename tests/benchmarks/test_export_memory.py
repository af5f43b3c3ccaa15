"""The memory benchmark at a small size: it runs, cleans up, and tells a writer that streams from one that does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "export_memory.py"
LAYER_MB = 2e-6 * (512 * 512 * 2.5 + 3 * 512 * 1408)
STREAMING = ["TensorRT-LLM fp8", "TensorRT-LLM fp8, tp 2", "onnx none", "engine none"]


def test_small(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    chosen = [*STREAMING, "export fp8, tp 4", "all in memory"]
    flags = [part for case in chosen for part in ("--case", case)]
    result = subprocess.run(
        [sys.executable, BENCHMARK, "--shape", "tiny", *flags, "--work", tmp_path / "work", "--json", tmp_path / "figures.json"],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert os.listdir(tmp_path / "work") == []
    assert "largest tensor 4 MB" in result.stdout
    body = json.loads((tmp_path / "figures.json").read_text())
    assert body["largest_tensor_mb"] == 4000 * 512 * 2 / 1e6
    rows = {(row["case"], row["layers"]): row for row in body["rows"]}
    cases = {case for case, _ in rows}
    assert rows.keys() == {(case, layers) for case in cases for layers in (4, 8)}
    assert cases == set(chosen)
    assert all(row["resident_mb"] > 0 and row["seconds"] > 0 for row in body["rows"])
    assert all(
        row["of_cp_source"] > 0 and row["of_cp_written"] > 0 for row in body["rows"] if row["case"] == "engine none"
    )
    growth = {case: rows[case, 8]["anonymous_mb"] - rows[case, 4]["anonymous_mb"] for case in cases}  # of 4 layers
    assert growth["all in memory"] > 0.8 * 4 * LAYER_MB
    for case in STREAMING:
        if case.startswith("TensorRT-LLM"):  # the graphs' buffers are of the size of this tiny model's layers
            assert growth[case] < 0.75 * 4 * LAYER_MB, case
        assert rows[case, 8]["written_mb"] > rows[case, 4]["written_mb"] + 0.4 * 4 * LAYER_MB
