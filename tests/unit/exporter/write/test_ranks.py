"""Ranks on several threads: the same files as one after the other, one bar, and an end at the first failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medusa_export.core import threads as heads_threads
from medusa_export.core.artifacts.manifest import output_directory
from medusa_export.exporter.write import ranks
from medusa_export.exporter.write.ranks import rank_names, write_ranks

TP = 4


class NotCompared:
    """Stands in for the comparison with the source: here is none."""

    def take(self, rank: int, path: Path, stop_point: Callable[[], None]) -> None: ...

    def begin(self, rank: int, path: Path) -> Callable[[str], None]:
        raise NotImplementedError


class Layout:
    """All that the writer of ranks asks of a spec."""

    tp = TP


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[int, int]]]:
    """``write(write_rank, cores=4)``: into ``tmp_path/out``; returns what the bar was told."""

    def run(write_rank: Callable[..., None], cores: int = TP) -> list[tuple[int, int]]:
        shown: list[tuple[int, int]] = []
        monkeypatch.setattr(heads_threads, "cpus", lambda: cores)
        monkeypatch.setattr(ranks, "write_rank", write_rank)
        with output_directory(tmp_path / "out", inputs={}, arguments={}) as work:
            write_ranks(work, None, Layout, None, NotCompared(), lambda *counts: shown.append(counts))
        return shown

    return run


def steps(path: Path, progress: Callable[[int, int], None], total: int) -> None:
    for done in range(1, total + 1):
        progress(done, total)
    path.write_text(path.name)


@pytest.mark.parametrize("cores", [1, 2, 4, 9])
@pytest.mark.parametrize("total", [3, 10**9])
def test_one_bar(cores: int, total: int, write: Any, tmp_path: Path) -> None:
    def rank(path: Path, _1: Any, _2: Any, _3: Any, _rank: int, progress: Callable[[int, int], None], *_: Any) -> None:
        for part in range(1, 4):
            progress(part * total // 3, total)
        path.write_text(path.name)

    shown = write(rank, cores)
    assert [whole for _, whole in shown] == [TP * total] * 3 * TP
    assert [done for done, _ in shown] == sorted(done for done, _ in shown)
    assert shown[-1] == (TP * total, TP * total)
    assert sorted(path.name for path in (tmp_path / "out/trtllm").iterdir()) == [
        f"rank{rank}.safetensors" for rank in range(TP)
    ]


def test_they_run_at_once_and_share_the_cores(write: Any) -> None:
    meeting, threads = threading.Barrier(TP, timeout=30), []
    before = torch.get_num_threads()
    torch.set_num_threads(9)

    def rank(path: Path, *_: Any) -> None:
        meeting.wait()
        threads.append(torch.get_num_threads())
        path.touch()

    try:
        write(rank)
        assert threads == [9 // TP] * TP
        assert torch.get_num_threads() == 9
        in_a_new_thread: list[int] = []
        thread = threading.Thread(target=lambda: in_a_new_thread.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert in_a_new_thread == [9]
    finally:
        torch.set_num_threads(before)


def test_the_first_failure_stops_the_others(write: Any) -> None:
    begun: list[int] = []
    running = threading.Event()

    def rank(path: Path, _1: Any, _2: Any, _3: Any, number: int, progress: Callable[[int, int], None], *_: Any) -> None:
        begun.append(number)
        if number == 0:
            assert running.wait(30)
            raise ZeroDivisionError
        running.set()
        while True:
            progress(1, 2)
            time.sleep(0.001)

    with pytest.raises(ZeroDivisionError):
        write(rank, cores=2)
    assert sorted(begun) == [0, 1]


def test_finished_ranks_count_in_the_bar(write: Any, tmp_path: Path) -> None:
    begun: list[int] = []

    def rank(path: Path, _1: Any, _2: Any, _3: Any, number: int, progress: Callable[[int, int], None], *_: Any) -> None:
        begun.append(number)
        if number == 2 and len(begun) == 3:
            raise ZeroDivisionError
        for done in (1, 2):
            progress(done, 2)
        path.touch()

    with pytest.raises(ZeroDivisionError):
        write(rank, cores=1)
    shown = write(rank, cores=1)
    assert begun == [0, 1, 2, 2, 3]
    assert shown == [(1, 4), (2, 4), (5, 8), (6, 8), (7, 8), (8, 8)]


def test_names() -> None:
    assert rank_names(2) == ["trtllm/rank0.safetensors", "trtllm/rank1.safetensors"]
