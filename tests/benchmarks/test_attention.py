"""benchmarks/attention.py: its ways compute one thing."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ATTENTION = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "attention.py"))
ways = ATTENTION["ways"]


def expected(layer: Any) -> np.ndarray:
    """Attention, written down.  # [S, HEADS, HEAD_DIM]"""
    k, v = (np.repeat(part, layer.q.shape[1] // part.shape[1], axis=1) for part in (layer.k, layer.v))
    scores = np.einsum("shd,thd->hst", layer.q, k) * layer.q.shape[-1] ** -0.5 + layer.bias
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hst,thd->shd", shares / shares.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("way", ways(), ids=lambda way: way.name)
@pytest.mark.parametrize("rows", [1, 3])
def test_every_way_is_attention(way, rows):
    layer = ATTENTION["sample"](20, rows, np.random.default_rng(1))
    bound = ATTENTION["Bound"](way, [layer], 0)
    bound.run()

    # Layouts differ, and which value is where is not what is measured.
    np.testing.assert_allclose(np.sort(bound.output(), axis=None), np.sort(expected(layer), axis=None), atol=1e-5)


def test_measures_every_way():
    found = ATTENTION["measure"](8, 2, layers=2, rounds=1, threads=0)

    assert list(found) == [way.name for way in ways()]
    assert min(found.values()) > 0
