"""What a server counts and times, under vLLM's names where it has one, so that dashboards made for vLLM show it."""

from __future__ import annotations

from dataclasses import dataclass

from medusa_export.engines.serving.request import FinishInfo


@dataclass(frozen=True)
class Load:
    """What a server has to do at one time.

    Attributes:
        running, waiting: requests that are decoded, and that wait.
        cache_use: part of the key/value cache that holds tokens, 0 .. 1.
    """

    running: int
    waiting: int
    cache_use: float = 0.0


class Meter:
    """What a server counts; this one counts nothing."""

    def first_token(self, seconds: float) -> None:
        """A request's first token, since it was submitted."""

    def tokens(self, count: int, seconds: float, drafts: int) -> None:
        """Tokens of one request in one step with so many drafts, since those before."""

    def ended(self, finish: FinishInfo) -> None:
        """A request ended."""

    def load(self, load: Load) -> None:
        """What there is to do now."""


SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
FIRST, BETWEEN = "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"
WHOLE = "vllm:e2e_request_latency_seconds"
PROMPT_TOKENS, TOKENS = "vllm:prompt_tokens_total", "vllm:generation_tokens_total"
STEPS, DRAFTS = "vllm:spec_decode_num_drafts_total", "vllm:spec_decode_num_draft_tokens_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
CACHE_USE = "vllm:kv_cache_usage_perc"
ANSWERED, ENDED = "vllm:request_success_total", "medusa_requests_ended_total"
REFUSED, PASSED_OVER = "medusa_requests_refused_total", "medusa_passed_over_fields_total"
# name -> (kind, what it is); the names carry their units
FAMILIES = {
    FIRST: ("HISTOGRAM", "Time from a request to its first token"),
    BETWEEN: ("HISTOGRAM", "Time between the tokens of one answer"),
    WHOLE: ("HISTOGRAM", "Time from a request to the end of its answer"),
    PROMPT_TOKENS: ("COUNTER", "Tokens of prompts"),
    TOKENS: ("COUNTER", "Generated tokens"),
    STEPS: ("COUNTER", "Decoding steps, counted for every request that took part"),
    DRAFTS: ("COUNTER", "Drafted tokens"),
    ACCEPTED: ("COUNTER", "Tokens that drafts saved a step for"),
    RUNNING: ("GAUGE", "Requests that are decoded"),
    WAITING: ("GAUGE", "Requests in the queue"),
    CACHE_USE: ("GAUGE", "Part of the key/value cache that holds tokens, 0 .. 1"),
}
# name -> (label, what it is): counters that are told apart by one more label
LABELLED = {
    ANSWERED: ("finished_reason", "Requests with an answer, by how it ended"),
    ENDED: ("reason", "Requests that ended, by reason"),
    REFUSED: ("reason", "Requests that were refused, by reason"),
}
ANSWERS = ("stop", "length")
REASONS = (*ANSWERS, "cancelled", "timeout", "closed", "error")
MODEL_LABEL = "model_name"


def step_counts(count: int, drafts: int) -> dict[str, int]:
    """What a step of one request adds to which counter.

    Args:
        count: tokens that it yielded.
    """
    return {TOKENS: count, STEPS: 1, DRAFTS: drafts, ACCEPTED: count - 1}
