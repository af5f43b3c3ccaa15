"""Vocabulary projections of integers: what they round, and that rows do not know of each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto

from medusa_export.exporter.onnx.builder import GraphBuilder
from medusa_export.exporter.onnx.vocabulary import BLOCKS, INTEGERS, Vocabulary

WEIGHT = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def session_of(vocabulary: Vocabulary, path: Path, open_session: Callable[..., Any], *, optimize: bool = True) -> Any:
    with GraphBuilder(path / "x.onnx", "vocabulary") as graph:
        graph.input("x", TensorProto.FLOAT, ["R", 64])
        vocabulary.write(graph, "x", "lm_head", WEIGHT, "y")
        graph.output("y", TensorProto.FLOAT, ["R", 40])
    return open_session(path / "x.onnx", optimize=optimize)


@pytest.mark.parametrize("vocabulary", [BLOCKS, INTEGERS], ids=["blocks", "integers"])
def test_close(vocabulary: Vocabulary, open_session: Callable[..., Any], tmp_path: Path) -> None:
    x = np.random.default_rng(2).standard_normal((3, 64)).astype(np.float32)
    (y,) = session_of(vocabulary, tmp_path, open_session).run(["y"], {"x": x})
    expected = x @ WEIGHT.float().numpy().T
    assert 0 < np.abs(y - expected).max() < 0.03 * np.abs(expected).max()


def test_rows_are_their_own(open_session: Callable[..., Any], tmp_path: Path) -> None:
    """A row of large values does not take the others' codes from them, nor does the number of rows; zeros stay zeros."""
    session = session_of(INTEGERS, tmp_path, open_session)
    x = np.random.default_rng(3).standard_normal((5, 64)).astype(np.float32)
    x[1] *= 1000
    x[2] = 0
    (together,) = session.run(["y"], {"x": x})
    alone = [session.run(["y"], {"x": x[row : row + 1]})[0][0] for row in range(5)]
    assert np.array_equal(together, np.stack(alone))
    assert not together[2].any()
    codes = np.round(x[0] / np.abs(x[0]).max() * 127)
    scales = WEIGHT.float().abs().amax(1).numpy() / 127
    rows = np.round(WEIGHT.float().numpy() / scales[:, None])
    np.testing.assert_allclose(together[0], (rows @ codes) * scales * np.abs(x[0]).max() / 127, rtol=1e-5, atol=1e-6)
