"""What a server counts and times."""

from __future__ import annotations

from medusa_export.engines.serving.request import FinishInfo


class Meter:
    """What a server counts; this one counts nothing."""

    def first_token(self, seconds: float) -> None:
        """A request's first token, since it was submitted."""

    def tokens(self, count: int, seconds: float) -> None:
        """Tokens of one request in one step, since those before."""

    def ended(self, end: FinishInfo) -> None:
        """A request ended."""

    def load(self, running: int, waiting: int) -> None:
        """Requests that are decoded, and that wait."""


SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0]
FIRST, BETWEEN = "medusa_time_to_first_token_seconds", "medusa_inter_token_seconds"
TOKENS, STEPS, ACCEPTED = "medusa_tokens_total", "medusa_steps_total", "medusa_drafts_accepted_total"
RUNNING, WAITING, ENDED = "medusa_requests_running", "medusa_requests_waiting", "medusa_requests_ended_total"
# name -> (kind, what it is); the names carry their units
FAMILIES = {
    FIRST: ("HISTOGRAM", "Time from a request to its first token"),
    BETWEEN: ("HISTOGRAM", "Time between the tokens of one answer"),
    TOKENS: ("COUNTER", "Generated tokens"),
    STEPS: ("COUNTER", "Decoding steps, counted for every request that took part"),
    ACCEPTED: ("COUNTER", "Tokens that drafts saved a step for"),
    RUNNING: ("GAUGE", "Requests that are decoded"),
    WAITING: ("GAUGE", "Requests in the queue"),
}
REASONS = ("stop", "length", "cancelled", "timeout", "closed", "error")
