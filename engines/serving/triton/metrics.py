"""Custom metrics of the Triton model: latencies, tokens, acceptance and load, beside Triton's own."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from medusa_export.engines.serving.meter import (
    ACCEPTED,
    BETWEEN,
    ENDED,
    FAMILIES,
    FIRST,
    REASONS,
    RUNNING,
    SECONDS,
    STEPS,
    TOKENS,
    WAITING,
    Meter,
)
from medusa_export.engines.serving.request import FinishInfo

FLUSH_SECONDS = 0.1


class TritonMeter(Meter):
    """Counts into Triton's metrics endpoint. Tokens that came in one step share the time that it took.

    Every number is a message to the server, so a thread of its own hands them on, summed up where they can be.

    Args:
        pb_utils: Triton's module.
        model: label of every metric.
    """

    def __init__(self, pb_utils: Any, model: str) -> None:
        self._families: list[Any] = []  # kept: a family that is collected takes its metrics along
        self._metrics: dict[str, Any] = {}
        for name, (kind, text) in FAMILIES.items():
            buckets = {"buckets": SECONDS} if kind == "HISTOGRAM" else {}
            self._metrics[name] = self._family(pb_utils, name, kind, text).Metric(labels={"model": model}, **buckets)
        family = self._family(pb_utils, ENDED, "COUNTER", "Requests that ended, by reason")
        self._metrics |= {reason: family.Metric(labels={"model": model, "reason": reason}) for reason in REASONS}
        self._pending: deque[tuple[str, float]] = deque()  # (histogram or counter, value)
        self._load = 0, 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="medusa-export-metrics", daemon=True)
        self._thread.start()

    def first_token(self, seconds: float) -> None:
        self._pending += [(FIRST, seconds), (TOKENS, 1)]

    def tokens(self, count: int, seconds: float) -> None:
        self._pending += [(BETWEEN, seconds / count)] * count
        self._pending += [(TOKENS, count), (STEPS, 1), (ACCEPTED, count - 1)]

    def ended(self, end: FinishInfo) -> None:
        self._pending.append((end.reason, 1))

    def load(self, running: int, waiting: int) -> None:
        self._load = running, waiting

    def close(self) -> None:
        """Hand on what is left, and stop. Metrics and families go now: one that lives until the interpreter ends asks a server that
        does not listen any more, and the stub ends with a segmentation fault."""
        self._stopping.set()
        self._thread.join()
        self._metrics.clear()  # before the families that they belong to
        self._families.clear()

    def _work(self) -> None:
        while not self._stopping.wait(FLUSH_SECONDS):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        sums: dict[str, float] = {}
        for _ in range(len(self._pending)):
            name, value = self._pending.popleft()
            if name in (FIRST, BETWEEN):
                self._metrics[name].observe(value)
            else:
                sums[name] = sums.get(name, 0) + value
        for name, value in sums.items():
            self._metrics[name].increment(value)
        running, waiting = self._load
        self._metrics[RUNNING].set(running)
        self._metrics[WAITING].set(waiting)

    def _family(self, pb_utils: Any, name: str, kind: str, text: str) -> Any:
        family = pb_utils.MetricFamily(name=name, description=text, kind=getattr(pb_utils.MetricFamily, kind))
        self._families.append(family)
        return family
