"""Both servers count the same: what happens to requests, in Prometheus' own registry and in Triton's, which is a stand-in here."""

from __future__ import annotations

import re
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

from medusa_export.engines.serving.meter import CountingMeter, Load
from medusa_export.engines.serving.openai.prometheus import PrometheusMeter
from medusa_export.engines.serving.request import FinishInfo
from medusa_export.engines.serving.triton.metrics import TritonMeter


class Registry:
    """Triton's MetricFamily, as far as it is used; ``numbers`` has what is in it by name and labels."""

    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

    def __init__(self) -> None:
        self.numbers: dict[str, float] = defaultdict(float)
        self.told = 0  # times that a counter was incremented

    def __call__(self, name: str, description: str, kind: str) -> Any:
        def metric(labels: dict[str, str], buckets: list[float] | None = None) -> Any:
            assert (buckets is not None) == (kind == self.HISTOGRAM)
            return SimpleNamespace(
                increment=lambda value: self.increment(key(name, labels), value),
                observe=lambda value: (self.add(key(f"{name}_sum", labels), value), self.add(key(f"{name}_count", labels), 1)),
                set=lambda value: self.numbers.update({key(name, labels): value}),
            )  # fmt: skip

        return SimpleNamespace(Metric=metric)

    def increment(self, name: str, value: float) -> None:
        self.add(name, value)
        self.told += 1

    def add(self, name: str, value: float) -> None:
        self.numbers[name] += value


def key(name: str, labels: dict[str, str]) -> str:
    return name + ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))


def happen(meter: CountingMeter) -> None:
    meter.load(Load(2, 1, 0.5))
    meter.first_token(0.25)
    for _ in range(3):
        meter.tokens(3, 0.3, 4)
    meter.ended(FinishInfo("stop", 5, 10, 3, 1.5))
    meter.ended(FinishInfo("cancelled", 7, 2, 1, 0.5))
    meter.refused("INVALID_ARG")
    meter.load(Load(1, 0, 0.25))


def counted_by_prometheus() -> dict[str, float]:
    meter = PrometheusMeter("m")
    happen(meter)
    lines = re.findall(r"^(\S+?)\{(.*)\} (\S+)$", meter.render()[0].decode(), re.MULTILINE)
    return {
        key(name, dict(re.findall(r'(\w+)="([^"]*)"', labels))): float(value)
        for name, labels, value in lines
        if not name.endswith(("_bucket", "_created")) and float(value)
    }


def test_both_count_the_same() -> None:
    registry = Registry()
    meter = TritonMeter(SimpleNamespace(MetricFamily=registry), "m")
    happen(meter)
    meter.close()
    found = {name: value for name, value in registry.numbers.items() if value}
    assert found.keys() == counted_by_prometheus().keys()
    for name, value in counted_by_prometheus().items():
        assert abs(found[name] - value) < 1e-9, name
    assert found['vllm:generation_tokens_totalmodel_name="m"'] == 10
    assert found['vllm:spec_decode_num_accepted_tokens_totalmodel_name="m"'] == 6
    assert found['vllm:num_requests_runningmodel_name="m"'] == 1
    assert found['vllm:inter_token_latency_seconds_countmodel_name="m"'] == 9
    assert found['vllm:e2e_request_latency_seconds_summodel_name="m"'] == 1.5, "of answers alone"
    assert registry.told == 9, "counters are told in sums: each is a message to the server"


def test_nothing_is_lost_when_it_ends() -> None:
    registry = Registry()
    meter = TritonMeter(SimpleNamespace(MetricFamily=registry), "m")
    meter.refused("UNAVAILABLE")
    meter.close()
    assert registry.numbers['medusa_requests_refused_totalmodel_name="m",reason="UNAVAILABLE"'] == 1
