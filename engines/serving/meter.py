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
        """Tokens that one step gave to one request.

        Args:
            count: tokens that were chosen.
            seconds: since those before.
            drafts: tokens that the step verified besides the root.
        """

    def ended(self, finish: FinishInfo) -> None:
        """A request ended."""

    def load(self, load: Load) -> None:
        """What there is to do now."""


SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
SIZES = [float(digit * 10**power) for power in range(6) for digit in (1, 2, 5)]  # tokens; in vLLM's steps
FIRST, BETWEEN = "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"
WHOLE = "vllm:e2e_request_latency_seconds"
QUEUE, PREFILL = "vllm:request_queue_time_seconds", "vllm:request_prefill_time_seconds"
DECODE = "vllm:request_decode_time_seconds"
PROMPT_SIZE, ANSWER_SIZE = "vllm:request_prompt_tokens", "vllm:request_generation_tokens"
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
    QUEUE: ("HISTOGRAM", "Time in the queue, of requests with an answer"),
    PREFILL: ("HISTOGRAM", "Time from the queue to the first token, of requests with an answer"),
    DECODE: ("HISTOGRAM", "Time from the first token to the last one, of requests with an answer"),
    PROMPT_SIZE: ("HISTOGRAM", "Tokens of one prompt, of requests with an answer"),
    ANSWER_SIZE: ("HISTOGRAM", "Tokens of one answer"),
    PROMPT_TOKENS: ("COUNTER", "Tokens of prompts"),
    TOKENS: ("COUNTER", "Generated tokens"),
    STEPS: ("COUNTER", "Decoding steps, counted for every request that took part"),
    DRAFTS: ("COUNTER", "Drafted tokens"),
    ACCEPTED: ("COUNTER", "Tokens that drafts saved a step for"),
    RUNNING: ("GAUGE", "Requests that are decoded"),
    WAITING: ("GAUGE", "Requests in the queue"),
    CACHE_USE: ("GAUGE", "Part of the key/value cache that holds tokens, 0 .. 1"),
}
BUCKETS = {name: SECONDS for name, (kind, _) in FAMILIES.items() if kind == "HISTOGRAM"}
BUCKETS |= {PROMPT_SIZE: SIZES, ANSWER_SIZE: SIZES}
# name -> (label, what it is): counters that are told apart by one more label
LABELLED = {
    ANSWERED: ("finished_reason", "Requests with an answer, by how it ended"),
    ENDED: ("reason", "Requests that ended, by reason"),
    REFUSED: ("reason", "Requests that were refused, by reason"),
}
ANSWERS = ("stop", "length")
REASONS = (*ANSWERS, "cancelled", "timeout", "closed", "error")
MODEL_LABEL = "model_name"


class CountingMeter(Meter):
    """Says what a server does in three kinds of numbers; where those are kept is its subclasses' business."""

    def first_token(self, seconds: float) -> None:
        self.observe(FIRST, seconds)
        self.add(TOKENS, 1)

    def tokens(self, count: int, seconds: float, drafts: int) -> None:
        """Tokens that came in one step share the time that it took.

        Args:
            count: tokens that were chosen.
            seconds: since those before.
            drafts: tokens that the step verified besides the root.
        """
        for _ in range(count):
            self.observe(BETWEEN, seconds / count)
        for name, number in ((TOKENS, count), (STEPS, 1), (DRAFTS, drafts), (ACCEPTED, count - 1)):
            self.add(name, number)

    def ended(self, finish: FinishInfo) -> None:
        self.add(ENDED, 1, finish.reason)
        self.add(PROMPT_TOKENS, finish.prompt_tokens)
        if finish.reason in ANSWERS:
            self.add(ANSWERED, 1, finish.reason)
            phases = finish.phases
            for name, number in (
                (WHOLE, finish.seconds), (QUEUE, phases.queue), (PREFILL, phases.prefill), (DECODE, phases.decode),
                (PROMPT_SIZE, finish.prompt_tokens), (ANSWER_SIZE, finish.completion_tokens),
            ):  # fmt: skip
                self.observe(name, number)

    def load(self, load: Load) -> None:
        for name, value in ((RUNNING, load.running), (WAITING, load.waiting), (CACHE_USE, load.cache_use)):
            self.set(name, value)

    def refused(self, reason: str) -> None:
        """A request was not taken: a code of the server's protocol."""
        self.add(REFUSED, 1, reason)

    def observe(self, name: str, number: float) -> None:
        """Into a histogram."""
        raise NotImplementedError

    def add(self, name: str, number: float, label: str = "") -> None:
        """To a counter; of those in LABELLED, the one with this value of its label.

        Args:
            name: of the counter.
            number: what it grows by.
            label: value of its label; empty: it has none.
        """
        raise NotImplementedError

    def set(self, name: str, value: float) -> None:
        """A gauge."""
        raise NotImplementedError
