"""What Prometheus reads: the same names as Triton's metrics, and the numbers of what happened."""

from __future__ import annotations

import re

from medusa_export.engines.serving.meter import ENDED, FAMILIES, REASONS
from medusa_export.engines.serving.openai.prometheus import PrometheusMeter
from medusa_export.engines.serving.request import FinishInfo


def test_counts() -> None:
    meter = PrometheusMeter('a "name"')
    meter.first_token(0.03)
    meter.tokens(3, 0.06)
    meter.tokens(1, 0.3)
    meter.load(2, 5)
    for reason in REASONS:
        meter.ended(FinishInfo(reason, 1, 2, 3, 4.0))
    content, media_type = meter.render()
    text = content.decode()
    assert media_type.startswith("text/plain")
    found = dict(re.findall(r"^(\w+)\{.*?\} (\S+)$", re.sub(r'model="a \\"name\\"",?', "", text), flags=re.MULTILINE))
    left_out = ("_created", "_bucket", "_sum")
    assert {name: float(value) for name, value in found.items() if not name.endswith(left_out)} == {
        "medusa_time_to_first_token_seconds_count": 1, "medusa_inter_token_seconds_count": 4, "medusa_tokens_total": 5,
        "medusa_steps_total": 2, "medusa_drafts_accepted_total": 2, "medusa_requests_running": 2, "medusa_requests_waiting": 5,
        "medusa_requests_ended_total": 1,
    }  # fmt: skip
    assert float(found["medusa_inter_token_seconds_sum"]) == 0.36
    assert all(f'reason="{reason}"' in text for reason in REASONS)
    assert all(f"{name}{{" in text or f"{name}_count{{" in text for name in (*FAMILIES, ENDED))


def test_two_meters_do_not_share() -> None:
    PrometheusMeter("a").first_token(1)
    assert 'medusa_tokens_total{model="a"} 0.0' in PrometheusMeter("a").render()[0].decode()
