"""What a server counts, for Prometheus: the metrics of the Triton model under the same names, and refused requests."""

from __future__ import annotations

import threading
from typing import Any

from medusa_export.core.errors import missing_package
from medusa_export.engines.serving.meter import (
    ANSWERED,
    ANSWERS,
    BUCKETS,
    ENDED,
    FAMILIES,
    LABELLED,
    MODEL_LABEL,
    PASSED_OVER,
    REASONS,
    CountingMeter,
)

MOST_FIELDS, OTHERS = 64, "(others)"  # names of fields that clients made up: so many have a counter of their own


class PrometheusMeter(CountingMeter):
    """Counts in a registry of its own.

    Args:
        model: label of every metric.

    Raises:
        MissingPackageError: no prometheus_client.
    """

    def __init__(self, model: str) -> None:
        try:
            import prometheus_client as client
        except ImportError as error:
            raise missing_package("prometheus_client", "serve") from error
        self._client, self._registry, self._model = client, client.CollectorRegistry(), model
        kinds = {"HISTOGRAM": client.Histogram, "COUNTER": client.Counter, "GAUGE": client.Gauge}
        self._metrics: dict[str, Any] = {}
        for name, (kind, text) in FAMILIES.items():
            more: dict[str, Any] = {"buckets": BUCKETS[name]} if name in BUCKETS else {}
            metric = kinds[kind](name, text, [MODEL_LABEL], registry=self._registry, **more)
            self._metrics[name] = metric.labels(model)
        self._labelled = {
            name: client.Counter(name, text, [MODEL_LABEL, label], registry=self._registry)
            for name, (label, text) in LABELLED.items()
        }
        for name, reasons in ((ANSWERED, ANSWERS), (ENDED, REASONS)):
            for reason in reasons:
                self._labelled[name].labels(model, reason)  # so that it is there, at 0
        text = "Fields of requests that were passed over, by name"
        self._passed_over = client.Counter(PASSED_OVER, text, [MODEL_LABEL, "field"], registry=self._registry)
        self._fields: set[str] = set()
        self._lock = threading.Lock()

    def observe(self, name: str, number: float) -> None:
        self._metrics[name].observe(number)

    def add(self, name: str, number: float, label: str = "") -> None:
        """As :meth:`~medusa_export.engines.serving.meter.CountingMeter.add`."""
        metric = self._labelled[name].labels(self._model, label) if label else self._metrics[name]
        metric.inc(number)

    def set(self, name: str, value: float) -> None:
        self._metrics[name].set(value)

    def passed_over(self, field: str) -> bool:
        """A field of a request was passed over; whether that is the first time for its name."""
        with self._lock:
            is_new = field not in self._fields and len(self._fields) < MOST_FIELDS
            if is_new:
                self._fields.add(field)
        self._passed_over.labels(self._model, field if field in self._fields else OTHERS).inc()
        return is_new

    def render(self) -> tuple[bytes, str]:
        """What Prometheus reads, and its media type."""
        return self._client.generate_latest(self._registry), str(self._client.CONTENT_TYPE_LATEST)
