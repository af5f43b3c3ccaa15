"""The ways in which logits are computed there, on a tiny float32 engine: all of them give the same."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "rows.py"


def test_every_way_gives_the_logits_of_the_last_tokens(tiny_engine: Callable[..., Any]) -> None:
    rows = runpy.run_path(str(SCRIPT))
    engine = tiny_engine()
    input_ids = np.random.default_rng(0).integers(1, 90, rows["TOKENS"] + 5).tolist()
    found = dict(rows["logits"](engine.path, rows["OnnxRuntimeEngine"](engine.path), input_ids))
    assert set(found) == {"1", "2", "4", "8", rows["BATCH"]}
    first = found["1"]
    assert first.shape == (rows["TOKENS"], 97)
    assert np.ptp(first, axis=0).min() > 0  # of different tokens
    for logits in found.values():
        np.testing.assert_allclose(logits, first, rtol=0, atol=1e-4)
