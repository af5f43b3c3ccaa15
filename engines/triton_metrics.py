"""Custom metrics of the Triton model: latencies, tokens, acceptance and load, beside Triton's own."""

from __future__ import annotations

from typing import Any

from medusa_export.engines.scheduler import End, Meter

SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
# name -> (kind, what it is); the names carry their units
FAMILIES = {
    "medusa_time_to_first_token_seconds": ("HISTOGRAM", "Time from a request to its first token"),
    "medusa_inter_token_seconds": ("HISTOGRAM", "Time between the tokens of one answer"),
    "medusa_tokens_total": ("COUNTER", "Generated tokens"),
    "medusa_steps_total": ("COUNTER", "Decoding steps, counted for every request that took part"),
    "medusa_drafts_accepted_total": ("COUNTER", "Tokens that drafts saved a step for"),
    "medusa_requests_running": ("GAUGE", "Requests that are decoded"),
    "medusa_requests_waiting": ("GAUGE", "Requests in the queue"),
}
ENDED = "medusa_requests_ended_total"
REASONS = ("stop", "length", "cancelled", "timeout", "closed", "error")


class TritonMeter(Meter):
    """Counts into Triton's metrics endpoint. Tokens that came in one step share the time that it took.

    Args:
        pb_utils: Triton's module.
        model: label of every metric.
    """

    def __init__(self, pb_utils: Any, model: str) -> None:
        self._families: list[Any] = []  # kept: a family that is collected takes its metrics along
        self._metrics = {}
        for name, (kind, text) in FAMILIES.items():
            buckets = {"buckets": SECONDS} if kind == "HISTOGRAM" else {}
            self._metrics[name] = self._family(pb_utils, name, kind, text).Metric(labels={"model": model}, **buckets)
        family = self._family(pb_utils, ENDED, "COUNTER", "Requests that ended, by reason")
        self._ended = {reason: family.Metric(labels={"model": model, "reason": reason}) for reason in REASONS}

    def first_token(self, seconds: float) -> None:
        self._metrics["medusa_time_to_first_token_seconds"].observe(seconds)
        self._metrics["medusa_tokens_total"].increment(1)

    def tokens(self, count: int, seconds: float) -> None:
        for _ in range(count):
            self._metrics["medusa_inter_token_seconds"].observe(seconds / count)
        self._metrics["medusa_tokens_total"].increment(count)
        self._metrics["medusa_steps_total"].increment(1)
        if count > 1:
            self._metrics["medusa_drafts_accepted_total"].increment(count - 1)

    def ended(self, end: End) -> None:
        self._ended[end.reason].increment(1)

    def load(self, running: int, waiting: int) -> None:
        self._metrics["medusa_requests_running"].set(running)
        self._metrics["medusa_requests_waiting"].set(waiting)

    def _family(self, pb_utils: Any, name: str, kind: str, text: str) -> Any:
        family = pb_utils.MetricFamily(name=name, description=text, kind=getattr(pb_utils.MetricFamily, kind))
        self._families.append(family)
        return family
