"""Custom metrics of the Triton model: latencies, tokens, acceptance and load, beside Triton's own."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from medusa_export.engines.serving.meter import (
    ANSWERED,
    ANSWERS,
    BETWEEN,
    CACHE_USE,
    ENDED,
    FAMILIES,
    FIRST,
    LABELLED,
    MODEL_LABEL,
    PROMPT_TOKENS,
    REASONS,
    REFUSED,
    RUNNING,
    SECONDS,
    TOKENS,
    WAITING,
    WHOLE,
    Load,
    Meter,
    step_counts,
)
from medusa_export.engines.serving.request import FinishInfo

REFUSALS = ("INVALID_ARG", "UNAVAILABLE")  # Triton's codes of requests that are not taken
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
            self._metrics[name] = self._family(pb_utils, name, kind, text).Metric(
                labels={MODEL_LABEL: model}, **buckets
            )
        for name, values in ((ANSWERED, ANSWERS), (ENDED, REASONS), (REFUSED, REFUSALS)):
            label, text = LABELLED[name]
            family = self._family(pb_utils, name, "COUNTER", text)
            self._metrics |= {
                f"{name} {value}": family.Metric(labels={MODEL_LABEL: model, label: value}) for value in values
            }
        self._pending: deque[tuple[str, float]] = deque()  # (histogram or counter, value)
        self._load = Load(0, 0)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="medusa-export-metrics", daemon=True)
        self._thread.start()

    def first_token(self, seconds: float) -> None:
        self._pending += [(FIRST, seconds), (TOKENS, 1)]

    def tokens(self, count: int, seconds: float, drafts: int) -> None:
        self._pending += [(BETWEEN, seconds / count)] * count
        self._pending += step_counts(count, drafts).items()

    def ended(self, finish: FinishInfo) -> None:
        self._pending += [(f"{ENDED} {finish.reason}", 1), (PROMPT_TOKENS, finish.prompt_tokens)]
        if finish.reason in ANSWERS:
            self._pending += [(f"{ANSWERED} {finish.reason}", 1), (WHOLE, finish.seconds)]

    def load(self, load: Load) -> None:
        self._load = load

    def refused(self, code: str) -> None:
        """A request was not taken: one of ``REFUSALS``."""
        self._pending.append((f"{REFUSED} {code}", 1))

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
            if name in (FIRST, BETWEEN, WHOLE):
                self._metrics[name].observe(value)
            else:
                sums[name] = sums.get(name, 0) + value
        for name, value in sums.items():
            self._metrics[name].increment(value)
        for name, value in (
            (RUNNING, self._load.running),
            (WAITING, self._load.waiting),
            (CACHE_USE, self._load.cache_use),
        ):
            self._metrics[name].set(value)

    def _family(self, pb_utils: Any, name: str, kind: str, text: str) -> Any:
        family = pb_utils.MetricFamily(name=name, description=text, kind=getattr(pb_utils.MetricFamily, kind))
        self._families.append(family)
        return family
