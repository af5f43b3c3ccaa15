"""Memory of a server's processes over time, from /proc."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

SECONDS = 1.0
PAGE = os.sysconf("SC_PAGE_SIZE")


class MemoryLog:
    """Notes resident memory every second while it is open.

    Args:
        processes: their ids now, by what they are.
        say: is told every minute.
    """

    def __init__(self, processes: Callable[[], dict[str, list[int]]], say: Callable[[str], None]) -> None:
        self._processes, self._say = processes, say
        self._samples: list[tuple[float, dict[str, float]]] = []  # seconds, MB by process
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> MemoryLog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def summary(self) -> dict[str, Any]:
        """Medians of the first and the last minute, or of what there is of them, and the slope over all but the first minute."""
        times = np.array([at for at, _ in self._samples])
        names = list(self._samples[0][1])
        values = {name: np.array([sample[name] for _, sample in self._samples]) for name in names}
        first, last = times <= times[0] + 60, times >= times[-1] - 60
        body: dict[str, Any] = {
            "first_minute_mb": {name: round(float(np.median(each[first])), 1) for name, each in values.items()},
            "last_minute_mb": {name: round(float(np.median(each[last])), 1) for name, each in values.items()},
            "largest_mb": {name: round(float(each.max()), 1) for name, each in values.items()},
        }
        if (~first).sum() > 60:
            slope = float(np.polyfit(times[~first] / 60, values["all"][~first], 1)[0])
            body["slope_mb_per_minute"] = round(slope, 3)
            body["every_10_s_mb"] = [round(float(value), 1) for value in values["all"][::10]]
        return body

    def _work(self) -> None:
        start, minutes = time.monotonic(), 0
        while True:
            self._samples.append((time.monotonic() - start, self._sample()))
            seconds, found = self._samples[-1]
            if int(seconds) // 60 > minutes:
                minutes = int(seconds) // 60
                self._say(f"minute {minutes}: {found['all']:.0f} MB")
            if self._done.wait(SECONDS):
                return

    def _sample(self) -> dict[str, float]:
        """MB; pages that processes share count in each."""
        found = {name: sum(map(_resident, ids)) for name, ids in self._processes().items()}
        return {**found, "all": sum(found.values())}


def _resident(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / 1e6
    except OSError:  # it has just ended
        return 0.0
