"""Continuous batching: one thread steps the batch; requests wait in a bounded queue, get tokens as they come, leave at any step."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

from medusa_export.engines.decoding.drafters import Drafter, TreeDrafter
from medusa_export.engines.decoding.protocols import TreeDecoder
from medusa_export.engines.decoding.step import PREFILL, ROOT, decode_step
from medusa_export.engines.serving.meter import Load, Meter
from medusa_export.engines.serving.request import (
    BusyError,
    ClosedError,
    FinishInfo,
    PromptError,
    RequestHandle,
    TokenCallbacks,
)
from medusa_export.heads.decoding.sampling import Sampling
from medusa_export.heads.decoding.token_choice import TokenChooser, token_chooser

PREFILL_TOKENS = 128  # of prompts that are read between two steps of the others

logger = logging.getLogger(__name__)


class Scheduler:
    """Decodes requests on a batch, as many at once as it has slots.

    Args:
        drafter: of the decoder's engine; None decodes without drafts.
        max_queue: requests that wait, at most; None: any number.
        prefill_tokens: of prompts that are read between two steps of the others; a longer prompt is read in parts.
        meter: is told of tokens and requests, in the scheduler's thread.
    """

    def __init__(
        self,
        decoder: TreeDecoder,
        *,
        drafter: Drafter | None = None,
        max_queue: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
        meter: Meter | None = None,
    ) -> None:
        self.decoder, self._max_queue = decoder, max_queue
        self._drafter: Drafter = drafter or TreeDrafter([ROOT], decoder.info)
        self._prefill_tokens, self._meter = prefill_tokens, meter or Meter()
        self.eos_token_ids = set(decoder.info.eos_token_ids)
        self._waiting: deque[RequestHandle] = deque()
        self._running: list[RequestHandle] = []  # in the order of the decoder's slots
        self._filling: RequestHandle | None = None  # its prompt is being read
        self._wake = threading.Condition()
        self.unread = 0  # tokens of that prompt
        self._closed = self._drains = False
        self._thread = threading.Thread(target=self._work, name="medusa-export-batch", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Requests that are decoded now, or whose prompt is being read."""
        return len(self._running) + (self._filling is not None)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def is_open(self) -> bool:
        """Whether requests are taken."""
        return not self._closed and self._thread.is_alive()

    def submit(
        self, input_ids: Sequence[int], sampling: Sampling, callbacks: TokenCallbacks, *, timeout_s: float = float("inf"),
        chooser: TokenChooser | None = None,
    ) -> RequestHandle:  # fmt: skip
        """Queue a request; the callbacks hear of it from now on.

        Args:
            timeout_s: it ends after so long, waiting included.
            chooser: what chooses its tokens. Default: as ``sampling`` says.

        Raises:
            PromptError: a prompt that leaves no room for an answer.
            ConfigError: one with a token that the model does not have.
            BusyError: the queue is full.
            ClosedError: the scheduler is stopping.
        """
        if not 0 < len(input_ids) < self.decoder.max_length:
            raise PromptError("prompt", len(input_ids), self.decoder.max_length)
        self.decoder.info.require_known(input_ids)
        chooser = chooser or token_chooser(sampling, input_ids, self.eos_token_ids)
        now = time.monotonic()
        handle = RequestHandle(input_ids, sampling, callbacks, chooser, submitted=now, deadline=now + timeout_s)
        with self._wake:
            if self._closed:
                raise ClosedError("server", "a request while it stops", "one before", "ask another server")
            if self._max_queue is not None and len(self._waiting) >= self._max_queue:
                got = f"a request while {len(self._waiting)} wait"
                raise BusyError("server", got, f"at most {self._max_queue} that wait", "try again in a moment")
            self._waiting.append(handle)
            self._wake.notify()
        return handle

    def close(self, *, drain: bool = False, timeout_s: float | None = None) -> None:
        """Take no more requests; those in flight are finished (``drain``), or end with "closed". Returns when the thread has ended.

        Args:
            timeout_s: wait for so long at most, then end what is left.
        """
        with self._wake:
            self._closed, self._drains = True, drain
            self._wake.notify()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._drains = False
            self._thread.join()

    def _work(self) -> None:
        while self._wait():
            try:
                self._drop_ended()
                self._fill()
                if self._running:
                    self.step()
            except Exception as error:  # whoever waits has to hear of it, and the next request may fare better
                logger.exception("a step failed")
                self._end_all("error", error)
            self._meter.load(Load(self.running, self.waiting, self._cache_use()))
        self._end_all("closed")

    def _cache_use(self) -> float:
        """Part of the cache's rows that hold tokens."""
        free = sum(self.decoder.remaining(slot) for slot in range(len(self._running)))
        return (len(self._running) * self.decoder.max_length - free) / (self.decoder.slots * self.decoder.max_length)

    def _wait(self) -> bool:
        """Sleep while there is nothing to do. False when the scheduler has stopped."""
        with self._wake:
            while not (self._closed or self.running or self._waiting):
                self._wake.wait()
            return not self._closed or (self._drains and bool(self.running or self._waiting))

    def _drop_ended(self) -> None:
        """End what was cancelled or took too long."""
        now = time.monotonic()
        for slot in reversed(range(len(self._running))):  # backwards, because the last one moves into a slot that ends
            if reason := _given_up(self._running[slot], now):
                self._release(slot, reason)
        if self._filling and (reason := _given_up(self._filling, now)):
            self._stop_filling(reason)
        with self._wake:
            ended = [(handle, reason) for handle in self._waiting if (reason := _given_up(handle, now))]
            for handle, _ in ended:
                self._waiting.remove(handle)
        for handle, reason in ended:
            self._end(handle, reason)

    def _fill(self) -> None:
        """Read prompts in the order of the queue while slots are free; running requests wait for a few tokens only."""
        room = self._prefill_tokens
        while room > 0:
            if self._filling is None:
                if not self._waiting or len(self._running) == self.decoder.slots:
                    return
                with self._wake:
                    self._filling = self._waiting.popleft()
                self._filling.begun_at = time.monotonic()
                self.unread = len(self._filling.input_ids)
            count = min(room, self.unread, PREFILL)
            try:
                self._read(self._filling, count)
            except Exception as error:  # this one's: too large for the memory that is left, for instance
                logger.exception("a prompt failed")
                self._stop_filling("error", error)
            room -= count

    def _read(self, handle: RequestHandle, count: int) -> None:
        """Read the next tokens of a prompt; with the last of them, its request joins those that run."""
        if self.unread == len(handle.input_ids):
            self.decoder.begin(handle.input_ids)
        logits = self.decoder.prefill_chunk(count)
        self.unread -= count
        if logits is None:
            return
        try:
            token = handle.chooser.draw(logits) if handle.chooser else int(logits.argmax())
            handle.drafted = self._drafter.begin([*handle.input_ids, token])
        except Exception:
            self.decoder.release(len(self._running))
            raise
        self._filling = None
        self._running.append(handle)
        self._take(len(self._running) - 1, [token], 0)

    def _stop_filling(self, reason: str, error: BaseException | None = None) -> None:
        handle, self._filling = self._filling, None
        self.decoder.drop()
        if handle is not None:
            self._end(handle, reason, error)

    def step(self) -> None:
        remaining = min(self.decoder.remaining(slot) for slot in range(len(self._running)))
        tree, node_ids = self._drafter.draft(self.decoder, [handle.drafted for handle in self._running], remaining)
        new = decode_step(self.decoder, tree, node_ids, [handle.chooser for handle in self._running])
        for slot in reversed(range(len(self._running))):
            self._running[slot].steps += 1
            self._running[slot].drafted.extend(new[slot])
            self._take(slot, new[slot], tree.num_nodes - 1)

    def _take(self, slot: int, tokens: Sequence[int], drafts: int) -> None:
        """New tokens of a request, one of which may be its last, from a step with that many drafts."""
        handle, reason, taken = self._running[slot], "", 0
        if handle.chooser and handle.chooser.error:
            self._release(slot, "error", handle.chooser.error)
            return
        for taken, token in enumerate(tokens, start=1):  # noqa: B007
            handle.tokens.append(token)
            wants_more = handle.callbacks.take(token)
            if (token in self.eos_token_ids and not handle.sampling.ignore_eos) or not wants_more:
                reason = "stop"
            elif len(handle.tokens) >= handle.sampling.max_tokens:
                reason = "length"
            if reason:
                break
        now, before = time.monotonic(), handle.last_token_at
        handle.last_token_at = now
        if handle.steps:
            self._meter.tokens(taken, now - before, drafts)
        else:
            handle.first_token_at = now
            self._meter.first_token(now - handle.submitted)
        if reason or not self.decoder.remaining(slot):
            self._release(slot, reason or "length")
        else:
            handle.callbacks.flush()

    def _release(self, slot: int, reason: str, error: BaseException | None = None) -> None:
        """Free a slot; the last request moves into it, as in the decoder."""
        handle = self._running[slot]
        self.decoder.release(slot)
        last = self._running.pop()
        if last is not handle:
            self._running[slot] = last
        self._end(handle, reason, error)

    def _end(self, handle: RequestHandle, reason: str, error: BaseException | None = None) -> None:
        seconds = time.monotonic() - handle.submitted
        prompt, answer = len(handle.input_ids), len(handle.tokens)
        end = FinishInfo(reason, prompt, answer, handle.steps, seconds, error, handle.phases)
        try:
            handle.callbacks.end(end)
        except Exception:  # one request's callbacks' fault is not the others'
            logger.exception("callbacks failed")
        self._meter.ended(end)

    def _end_all(self, reason: str, error: BaseException | None = None) -> None:
        for slot in reversed(range(len(self._running))):
            self.decoder.release(slot)
            self._end(self._running.pop(), reason, error)
        self._stop_filling(reason, error)
        with self._wake:
            waiting = list(self._waiting) if reason == "closed" else []
            self._waiting = deque() if reason == "closed" else self._waiting
        for handle in waiting:
            self._end(handle, reason)


def _given_up(handle: RequestHandle, now: float) -> str:
    """Why a request ends before its answer does, or an empty string."""
    if handle.is_cancelled:
        return "cancelled"
    return "timeout" if now >= handle.deadline else ""
