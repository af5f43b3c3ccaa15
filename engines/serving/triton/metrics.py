"""Custom metrics of the Triton model: latencies, tokens, acceptance and load, beside Triton's own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

from medusa_export.engines.serving.meter import (
    ANSWERED,
    ANSWERS,
    BUCKETS,
    ENDED,
    FAMILIES,
    LABELLED,
    MODEL_LABEL,
    REASONS,
    REFUSED,
    CountingMeter,
    Load,
)

REFUSALS = ("INVALID_ARG", "UNAVAILABLE")  # Triton's codes of requests that are not taken
FLUSH_SECONDS = 0.1


class TritonMeter(CountingMeter):
    """Counts into Triton's metrics endpoint.

    Every number is a message to the server, so a thread of its own hands them on, summed up where they can be.

    Args:
        pb_utils: Triton's module.
        model: label of every metric.
    """

    def __init__(self, pb_utils: Any, model: str) -> None:
        self._families: list[Any] = []  # kept: a family that is collected takes its metrics along
        self._metrics: dict[str, Any] = {}
        for name, (kind, text) in FAMILIES.items():
            buckets = {"buckets": BUCKETS[name]} if name in BUCKETS else {}
            self._metrics[name] = self._family(pb_utils, name, kind, text).Metric(
                labels={MODEL_LABEL: model}, **buckets
            )
        for name, values in ((ANSWERED, ANSWERS), (ENDED, REASONS), (REFUSED, REFUSALS)):
            label, text = LABELLED[name]
            family = self._family(pb_utils, name, "COUNTER", text)
            self._metrics |= {
                f"{name} {value}": family.Metric(labels={MODEL_LABEL: model, label: value}) for value in values
            }
        self._observed: deque[tuple[str, float]] = deque()
        self._added: deque[tuple[str, float]] = deque()
        self._gauges: dict[str, float] = {}
        self.load(Load(0, 0))
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="medusa-export-metrics", daemon=True)
        self._thread.start()

    def observe(self, name: str, number: float) -> None:
        self._observed.append((name, number))

    def add(self, name: str, number: float, label: str = "") -> None:
        """As :meth:`~medusa_export.engines.serving.meter.CountingMeter.add`."""
        self._added.append((f"{name} {label}" if label else name, number))

    def set(self, name: str, value: float) -> None:
        self._gauges[name] = value

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
        for name, number in _taken(self._observed):
            self._metrics[name].observe(number)
        sums: dict[str, float] = {}
        for name, number in _taken(self._added):
            sums[name] = sums.get(name, 0) + number
        for name, number in sums.items():
            self._metrics[name].increment(number)
        for name, value in list(self._gauges.items()):
            self._metrics[name].set(value)

    def _family(self, pb_utils: Any, name: str, kind: str, text: str) -> Any:
        family = pb_utils.MetricFamily(name=name, description=text, kind=getattr(pb_utils.MetricFamily, kind))
        self._families.append(family)
        return family


def _taken(pending: deque[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    """What is there now; more may come meanwhile."""
    for _ in range(len(pending)):
        yield pending.popleft()
