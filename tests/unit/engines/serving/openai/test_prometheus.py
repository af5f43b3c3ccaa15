"""What Prometheus reads: the same names as Triton's metrics, and the numbers of what happened."""

from __future__ import annotations

import re

from medusa_export.engines.serving.meter import ENDED, FAMILIES, REASONS, Load
from medusa_export.engines.serving.openai.prometheus import MOST_FIELDS, PrometheusMeter
from medusa_export.engines.serving.request import FinishInfo, Phases

PARTS = ("queue", "prefill", "decode")


def test_counts() -> None:
    meter = PrometheusMeter('a "name"')
    meter.first_token(0.03)
    meter.tokens(3, 0.06, 7)
    meter.tokens(1, 0.3, 7)
    meter.load(Load(2, 5, 0.25))
    for reason in REASONS:
        meter.ended(FinishInfo(reason, 10, 2, 3, 4.0, phases=Phases(0.5, 1.0, 2.0)))
    meter.refused("server_busy")
    content, media_type = meter.render()
    text = content.decode()
    assert media_type.startswith("text/plain")
    found = dict(
        re.findall(r"^([\w:]+)\{.*?\} (\S+)$", re.sub(r'model_name="a \\"name\\"",?', "", text), flags=re.MULTILINE)
    )
    left_out = ("_created", "_bucket", "_sum")
    requests = [
        f"vllm:request_{name}"
        for name in ("prompt_tokens", "generation_tokens", *(f"{part}_time_seconds" for part in PARTS))
    ]
    assert {name: float(value) for name, value in found.items() if not name.endswith(left_out)} == {
        "vllm:time_to_first_token_seconds_count": 1, "vllm:inter_token_latency_seconds_count": 4,
        "vllm:e2e_request_latency_seconds_count": 2, **{f"{name}_count": 2 for name in requests},
        "vllm:generation_tokens_total": 5, "vllm:prompt_tokens_total": 60,
        "vllm:spec_decode_num_drafts_total": 2, "vllm:spec_decode_num_draft_tokens_total": 14,
        "vllm:spec_decode_num_accepted_tokens_total": 2, "vllm:num_requests_running": 2, "vllm:num_requests_waiting": 5,
        "vllm:kv_cache_usage_perc": 0.25, "vllm:request_success_total": 1, "medusa_requests_ended_total": 1,
        "medusa_requests_refused_total": 1,
    }  # fmt: skip
    assert float(found["vllm:inter_token_latency_seconds_sum"]) == 0.36
    assert [float(found[f"{name}_sum"]) for name in requests] == [20, 4, 1, 2, 4]
    assert 'vllm:request_prompt_tokens_bucket{le="5.0",model_name="a \\"name\\""} 0.0' in text, "tokens are no seconds"
    assert 'vllm:request_prompt_tokens_bucket{le="10.0",model_name="a \\"name\\""} 2.0' in text
    assert all(f'reason="{reason}"' in text for reason in REASONS)
    assert all(f"{name}{{" in text or f"{name}_count{{" in text for name in (*FAMILIES, ENDED))


def test_names_that_clients_make_up_are_bounded() -> None:
    meter = PrometheusMeter("m")
    assert meter.passed_over("a")
    assert not meter.passed_over("a")
    assert sum(meter.passed_over(f"name{index}") for index in range(1000)) == MOST_FIELDS - 1
    text = meter.render()[0].decode()
    assert 'field="a",model_name="m"} 2.0' in text
    assert f'field="(others)",model_name="m"}} {1000 - MOST_FIELDS + 1}.0' in text


def test_two_meters_do_not_share() -> None:
    PrometheusMeter("a").first_token(1)
    assert 'vllm:generation_tokens_total{model_name="a"} 0.0' in PrometheusMeter("a").render()[0].decode()
