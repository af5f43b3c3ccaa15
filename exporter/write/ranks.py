"""Writes the ranks of a TensorRT-LLM checkpoint on several threads, under one progress bar."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from medusa_export.core.artifacts.resumable import ResumableOutput
from medusa_export.core.threads import StopPoint, run_torch
from medusa_export.exporter.plan.spec import ExportSpec
from medusa_export.exporter.verify.comparison import Comparison
from medusa_export.exporter.write.trtllm import write_rank
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.quantize.scales import Scales

Progress = Callable[[int, int], None]


def rank_names(tp: int) -> list[str]:
    """The ranks' files in an export."""
    return [f"trtllm/rank{rank}.safetensors" for rank in range(tp)]


def write_ranks(
    work: ResumableOutput,
    checkpoint: MedusaCheckpoint,
    spec: ExportSpec,
    scales: Scales,
    compared: Comparison,
    progress: Progress,
) -> None:
    """Every rank that is not finished, one a core at a time; the first that fails stops the others.

    Args:
        scales: as ``require_scales`` returned them.
        compared: gets every tensor right behind its writing, while file and source are in memory, and the ranks that were finished.
        progress: called with (done, total) of all ranks together, in the unit that ``write_rank`` reports.

    Raises:
        MedusaExportError: what ``write_rank`` raises.
    """
    names, bar = rank_names(spec.tp), _Bar(spec.tp, progress)

    def write(rank: int, stop_point: StopPoint) -> None:
        def update(done: int, total: int) -> None:
            stop_point()
            bar.update(rank, done, total)

        follow = partial(compared.begin, rank)
        if not work.run_once(
            names[rank], lambda path: write_rank(path, checkpoint, spec, scales, rank, update, follow)
        ):
            bar.skip(rank)
            compared.take(rank, work.path / names[rank], stop_point)

    run_torch(write, range(spec.tp))


class _Bar:
    """(done, total) of every rank as that of all. Their layout is the same: one that has said nothing yet counts as the largest."""

    def __init__(self, ranks: int, progress: Progress) -> None:
        self._ranks, self._progress = ranks, progress
        self._counts: dict[int, tuple[int, int]] = {}
        self._skipped: set[int] = set()
        self._lock = threading.Lock()

    def update(self, rank: int, done: int, total: int) -> None:
        with self._lock:
            self._counts[rank] = (done, total)
            self._show()

    def skip(self, rank: int) -> None:
        """The rank was there already."""
        with self._lock:
            self._skipped.add(rank)
            self._show()

    def _show(self) -> None:
        largest = max((total for _, total in self._counts.values()), default=1)
        done = sum(done for done, _ in self._counts.values()) + largest * len(self._skipped)
        total = sum(total for _, total in self._counts.values()) + largest * (self._ranks - len(self._counts))
        self._progress(done, total)
