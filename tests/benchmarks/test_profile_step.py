"""The profile's parts: every size has the operators of a step. No time is asserted."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "profile_step.py"


def test_operators_of_every_size(tiny_engine: Callable[..., Any]) -> None:
    profile = runpy.run_path(str(SCRIPT))
    found = profile["operators"](profile["ProfiledEngine"](tiny_engine().path), past=8)
    assert list(found) == list(profile["SIZES"])
    for sizes in found.values():
        assert {"GroupQueryAttention", "MatMul -> 97"} <= set(sizes)
        assert all(milliseconds >= 0 for milliseconds in sizes.values())
