"""Memory whose pages exist once they are written: for key/value caches, of which sequences reach a part.

numpy asks the kernel for huge pages (2 MB) for every array above 4 MB. A slot's rows of one layer are far smaller, so that the first
one written there brings those of its neighbours along: twice the memory, and milliseconds of zeroing in the middle of a step.
"""

from __future__ import annotations

import math
import mmap

import numpy as np
import numpy.typing as npt


def lazy_zeros(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """float32 zeros in pages of the smallest size, where the system lets a program choose (Linux)."""
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return np.zeros(shape, dtype=np.float32)
    size = math.prod(shape) * np.dtype(np.float32).itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype=np.float32).reshape(shape)
