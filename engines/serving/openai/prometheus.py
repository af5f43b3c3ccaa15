"""What a server counts, for Prometheus: the metrics of the Triton model under the same names."""

from __future__ import annotations

from typing import Any

from medusa_export.core.errors import missing_package
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


class PrometheusMeter(Meter):
    """Counts in a registry of its own. Tokens that came in one step share the time that it took.

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
        self._client, self._registry = client, client.CollectorRegistry()
        kinds = {"HISTOGRAM": client.Histogram, "COUNTER": client.Counter, "GAUGE": client.Gauge}
        self._metrics: dict[str, Any] = {}
        for name, (kind, text) in FAMILIES.items():
            more: dict[str, Any] = {"buckets": SECONDS} if kind == "HISTOGRAM" else {}
            metric = kinds[kind](name, text, ["model"], registry=self._registry, **more)
            self._metrics[name] = metric.labels(model)
        text = "Requests that ended, by reason"
        ended = client.Counter(ENDED, text, ["model", "reason"], registry=self._registry)
        self._ended = {reason: ended.labels(model, reason) for reason in REASONS}

    def first_token(self, seconds: float) -> None:
        self._metrics[FIRST].observe(seconds)
        self._metrics[TOKENS].inc()

    def tokens(self, count: int, seconds: float) -> None:
        for _ in range(count):
            self._metrics[BETWEEN].observe(seconds / count)
        self._metrics[TOKENS].inc(count)
        self._metrics[STEPS].inc()
        self._metrics[ACCEPTED].inc(count - 1)

    def ended(self, end: FinishInfo) -> None:
        self._ended[end.reason].inc()

    def load(self, running: int, waiting: int) -> None:
        self._metrics[RUNNING].set(running)
        self._metrics[WAITING].set(waiting)

    def render(self) -> tuple[bytes, str]:
        """What Prometheus reads, and its media type."""
        return self._client.generate_latest(self._registry), str(self._client.CONTENT_TYPE_LATEST)
