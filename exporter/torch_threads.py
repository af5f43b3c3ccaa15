"""Tensor work on several threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from medusa_export.core import threads
from medusa_export.core.threads import StopPoint, run_all

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def run_torch(task: Callable[[_Item, StopPoint], _Result], items: Sequence[_Item]) -> list[_Result]:
    """``run_all`` with as many workers as cores, which share torch's own threads."""
    workers, before = max(1, min(len(items), threads.cpus())), torch.get_num_threads()
    each = max(1, before // workers)
    try:
        return run_all(task, items, workers=workers, initializer=lambda: torch.set_num_threads(each))
    finally:
        torch.set_num_threads(before)  # the setting of a thread becomes that of all that come after it
