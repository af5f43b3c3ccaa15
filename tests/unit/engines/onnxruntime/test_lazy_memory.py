"""Zeros that take memory where they are written, and nowhere else."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from medusa_export.engines.onnxruntime.lazy_memory import lazy_zeros

HUGE = 2 << 20  # bytes of a huge page, with which numpy's own arrays would fill up


def test_zeros_that_can_be_written() -> None:
    made = lazy_zeros((3, 5, 7))
    assert (made.shape, made.dtype, made.flags.c_contiguous) == ((3, 5, 7), np.float32, True)
    made[1, 2] = 4
    assert made.sum() == 28


@pytest.mark.skipif(not hasattr(mmap, "MADV_NOHUGEPAGE"), reason="only Linux lets a program choose")
def test_memory_of_what_is_written() -> None:
    made = lazy_zeros((64, HUGE // 4))
    before = resident()
    made[:, 5] = 1  # one value of each huge page
    assert resident() - before < made.nbytes / 8
    assert made.sum() == 64


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
