"""Continuous batching: the same tokens as one sequence at a time, whatever else happens to the batch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.engines.decoding.batch_trees import BatchTrees
from medusa_export.engines.decoding.draft_kinds import Engine, open_drafter
from medusa_export.engines.decoding.generate import generate
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE
from medusa_export.engines.onnxruntime.batch_engine import TreeBatchDecoder
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.engines.onnxruntime.lane import Lane
from medusa_export.engines.serving.meter import Load, Meter
from medusa_export.engines.serving.request import BusyError, ClosedError, FinishInfo, Phases, RequestHandle
from medusa_export.engines.serving.scheduler import Scheduler
from medusa_export.heads.decoding.sampling import Sampler, Sampling
from medusa_export.heads.trees.tree import Tree

PROMPTS = [[3, 4, 5], [9, 8, 7, 6, 5, 4, 3], [11], [5, 5, 12, 13], [20, 21], [30, 31, 32], [40], [7, 7, 7]]
TREE = Tree.from_choices([[0], [1], [0, 0], [2], [1, 0]])
SECONDS = 60


class Ears:
    """Callbacks that remember, and can be told to want no more, or to hold the scheduler's thread."""

    def __init__(self, enough: int = 10**6) -> None:
        self.tokens: list[int] = []
        self.ends: list[FinishInfo] = []
        self.ended, self.started, self.may_go_on = threading.Event(), threading.Event(), threading.Event()
        self.may_go_on.set()
        self._enough = enough

    def take(self, token: int) -> bool:
        self.tokens.append(token)
        self.started.set()
        assert self.may_go_on.wait(SECONDS)
        return len(self.tokens) < self._enough

    def flush(self) -> None:
        pass

    def end(self, end: FinishInfo) -> None:
        self.ends.append(end)
        self.ended.set()

    def wait(self) -> FinishInfo:
        assert self.ended.wait(SECONDS)
        (end,) = self.ends
        return end


@pytest.fixture
def engine_dir(tiny_engine: Callable[..., Any]) -> Path:
    path: Path = tiny_engine(drafts_well=True).path
    return path


@pytest.fixture
def schedule(engine_dir: Path) -> Iterator[Callable[..., Scheduler]]:
    """``schedule(slots=2, max_length=None, *, has_ends, drafts, trees, **arguments) -> Scheduler``, closed in the end."""
    made: list[Scheduler] = []

    def make(
        slots: int = 2,
        max_length: int | None = None,
        *,
        has_ends: bool = False,
        drafts: str = "heads",
        trees: BatchTrees | None = None,
        **arguments: Any,
    ) -> Scheduler:
        decoder = TreeBatchDecoder(engine_dir, slots=slots, max_length=max_length)
        engine = Engine(engine_dir, decoder.info, trees or BatchTrees({}), decoder.max_nodes)
        made.append(Scheduler(decoder, drafter=open_drafter(drafts, engine), **arguments))
        if not has_ends:
            made[-1].eos_token_ids = set()  # so that a test knows how long an answer takes
        return made[-1]

    yield make
    for scheduler in made:
        scheduler.close()


def alone(engine_dir: Path, ids: list[int], count: int, sampler: Sampler | None = None) -> list[int]:
    """What the single-sequence engine says."""
    engine = OnnxRuntimeEngine(engine_dir)
    eos = engine.info.eos_token_ids
    return generate(engine, ids, AUTOREGRESSIVE, max_new_tokens=count, eos_token_ids=eos, sampler=sampler).tokens


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("tree_max_batch", [0, 2, 3])
def test_every_answer_is_the_one_of_a_sequence_alone(
    engine_dir: Path, schedule: Callable[..., Scheduler], temperature: float, tree_max_batch: int
) -> None:
    scheduler = schedule(slots=3, has_ends=True, trees=BatchTrees({tree_max_batch: TREE}))
    callbacks = [Ears() for _ in PROMPTS]
    for index, (ids, ears) in enumerate(
        zip(PROMPTS, callbacks, strict=True)
    ):  # so that slots free up at different times
        scheduler.submit(ids, Sampling(temperature, max_tokens=4 + 3 * index, seed=index), ears)
    yields = []
    for index, (ids, ears) in enumerate(zip(PROMPTS, callbacks, strict=True)):
        end = ears.wait()
        yields.append(end.tokens_per_step)
        sampler = Sampler(temperature, index) if temperature else None
        assert ears.tokens == alone(engine_dir, ids, 4 + 3 * index, sampler)
        assert (end.prompt_tokens, end.completion_tokens) == (len(ids), len(ears.tokens))
        assert end.reason == ("stop" if ears.tokens[-1] == 2 else "length")
    assert (max(yields) > 1) == (tree_max_batch > 0), "the tree was used, or was not, against what was asked"


@pytest.mark.parametrize("drafts", ["text", "both"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_drafts_of_the_text_change_no_answer(
    engine_dir: Path, schedule: Callable[..., Scheduler], drafts: str, temperature: float
) -> None:
    """Prompts that repeat themselves, several at once, each with its own drafts."""
    scheduler, engine = schedule(slots=3, drafts=drafts), OnnxRuntimeEngine(engine_dir)
    prompts = [[ids[0], *alone(engine_dir, ids[:1], 30), *ids[:1]] for ids in PROMPTS]
    listeners, yields = [Ears() for _ in prompts], list[float]()
    for index, (ids, ears) in enumerate(zip(prompts, listeners, strict=True)):
        scheduler.submit(ids, Sampling(temperature, max_tokens=9 + 3 * index, seed=index), ears)
    for index, (ids, ears) in enumerate(zip(prompts, listeners, strict=True)):
        yields.append(ears.wait().tokens_per_step)
        sampler = Sampler(temperature, index) if temperature else None
        expected = generate(
            engine, ids, AUTOREGRESSIVE, max_new_tokens=9 + 3 * index, eos_token_ids=(), sampler=sampler
        )  # fmt: skip
        assert ears.tokens == expected.tokens
    assert max(yields) > 1, "nothing was accepted"


def test_an_end_of_sequence_token_stops(schedule: Callable[..., Scheduler], engine_dir: Path) -> None:
    scheduler, ears = schedule(), Ears()
    expected = alone(engine_dir, PROMPTS[0], 12)
    scheduler.eos_token_ids = {expected[5]}
    scheduler.submit(PROMPTS[0], Sampling(max_tokens=12), ears)
    assert ears.wait().reason == "stop"
    assert ears.tokens == expected[: expected.index(expected[5]) + 1]


def test_a_listener_that_has_enough_ends_its_request(schedule: Callable[..., Scheduler]) -> None:
    scheduler, ears = schedule(), Ears(enough=3)
    scheduler.submit(PROMPTS[0], Sampling(max_tokens=50), ears)
    assert (ears.wait().reason, len(ears.tokens)) == ("stop", 3)


@pytest.mark.parametrize("trees", [None, BatchTrees({1: TREE})], ids=["none", "tree"])
def test_a_full_context_ends_with_length(schedule: Callable[..., Scheduler], trees: BatchTrees | None) -> None:
    scheduler, ears = schedule(max_length=10, trees=trees), Ears()
    scheduler.submit([3, 4, 5], Sampling(max_tokens=50), ears)
    assert ears.wait().reason == "length"
    assert len(ears.tokens) == 8  # seven more rows, and the token behind the last one


def test_a_cancelled_request_frees_its_slot_within_a_step(schedule: Callable[..., Scheduler]) -> None:
    scheduler, first, second = schedule(slots=1), Ears(), Ears()
    first.may_go_on.clear()
    handle = scheduler.submit([3, 4], Sampling(max_tokens=100), first)
    assert first.started.wait(SECONDS)
    scheduler.submit([5, 6], Sampling(max_tokens=2), second)
    handle.cancel()
    first.may_go_on.set()
    assert second.wait().reason == "length"
    assert first.wait().reason == "cancelled"
    assert len(first.tokens) <= 2


def test_a_long_prompt_does_not_hold_up_the_others(schedule: Callable[..., Scheduler], engine_dir: Path) -> None:
    """It is read in parts: between any two of them the running request gets a token."""
    scheduler, running, long = schedule(slots=3, prefill_tokens=3), Ears(), Ears()
    events: list[str] = []
    fill, step = scheduler.decoder.prefill_chunk, scheduler.step
    scheduler.decoder.prefill_chunk = lambda count: (events.append(f"fill {count}"), fill(count))[1]  # type: ignore[method-assign]
    scheduler.step = lambda: (events.append("step"), step())[1]  # type: ignore[method-assign]
    running.may_go_on.clear()
    scheduler.submit(PROMPTS[0], Sampling(max_tokens=12), running)
    assert running.started.wait(SECONDS)
    scheduler.submit([9] * 8, Sampling(max_tokens=3), long)
    running.may_go_on.set()
    assert (running.wait().reason, long.wait().reason) == ("length", "length")
    assert events[:7] == ["fill 3", "step", "fill 3", "step", "fill 3", "step", "fill 2"]
    assert running.tokens == alone(engine_dir, PROMPTS[0], 12)
    assert long.tokens == alone(engine_dir, [9] * 8, 3)


def test_a_request_whose_prompt_is_being_read_can_be_cancelled(
    schedule: Callable[..., Scheduler], engine_dir: Path
) -> None:
    scheduler, running, long, later = schedule(slots=2, prefill_tokens=2), Ears(), Ears(), Ears()
    fill, reading, may_go_on = scheduler.decoder.prefill_chunk, threading.Event(), threading.Event()

    def wait_and_fill(count: int) -> Any:
        if scheduler.unread in (8, 9):
            reading.set()
            assert may_go_on.wait(SECONDS)
        return fill(count)

    scheduler.decoder.prefill_chunk = wait_and_fill  # type: ignore[method-assign]
    scheduler.submit(PROMPTS[0], Sampling(max_tokens=9), running)
    handle = scheduler.submit([9] * 20, Sampling(max_tokens=3), long)
    assert reading.wait(SECONDS)
    assert scheduler.running >= 1
    handle.cancel()
    scheduler.submit(PROMPTS[1], Sampling(max_tokens=5), later)
    may_go_on.set()
    assert (long.wait().reason, long.tokens) == ("cancelled", [])
    assert later.wait().reason == "length"
    assert later.tokens == alone(engine_dir, PROMPTS[1], 5)
    assert running.wait().reason == "length"
    assert running.tokens == alone(engine_dir, PROMPTS[0], 9)


def test_one_that_waits_can_be_cancelled(schedule: Callable[..., Scheduler]) -> None:
    scheduler, first, second = schedule(slots=1), Ears(), Ears()
    scheduler.submit([3, 4], Sampling(max_tokens=100), first)
    scheduler.submit([5, 6], Sampling(), second).cancel()
    assert (second.wait().reason, second.tokens) == ("cancelled", [])
    assert first.wait().completion_tokens == 100


def test_one_that_was_never_begun_has_only_waited() -> None:
    handle = RequestHandle([1], Sampling(), Ears(), None, submitted=5.0, deadline=9.0)
    assert handle.phases == Phases()
    handle.begun_at = 7.0
    assert handle.phases == Phases(2.0)
    handle.first_token_at, handle.last_token_at = 8.0, 12.0
    assert handle.phases == Phases(2.0, 1.0, 4.0)


def test_time_limits_count_the_waiting(schedule: Callable[..., Scheduler]) -> None:
    scheduler, first, second, third = schedule(slots=1), Ears(), Ears(), Ears()
    first.may_go_on.clear()
    scheduler.submit([3, 4], Sampling(max_tokens=100), first, timeout_s=0.05)
    scheduler.submit([5, 6], Sampling(), second, timeout_s=0.05)
    scheduler.submit([7, 8], Sampling(max_tokens=2), third)
    assert first.started.wait(SECONDS)
    time.sleep(0.06)
    first.may_go_on.set()
    assert (first.wait().reason, second.wait().reason, third.wait().reason) == ("timeout", "timeout", "length")
    assert second.tokens == []


def test_a_full_queue_says_so_and_the_others_are_answered(schedule: Callable[..., Scheduler]) -> None:
    scheduler, first, second = schedule(slots=1, max_queue=1), Ears(), Ears()
    first.may_go_on.clear()
    scheduler.submit([3, 4], Sampling(max_tokens=3), first)
    assert first.started.wait(SECONDS)
    scheduler.submit([5, 6], Sampling(max_tokens=3), second)
    with pytest.raises(BusyError, match="1 wait"):
        scheduler.submit([7, 8], Sampling(), Ears())
    first.may_go_on.set()
    assert [first.wait().reason, second.wait().reason] == ["length", "length"]
    scheduler.submit([7, 8], Sampling(max_tokens=1), Ears())


def wait_until_closed(scheduler: Scheduler) -> None:
    deadline = time.monotonic() + SECONDS
    with suppress(ClosedError):
        while time.monotonic() < deadline:
            scheduler.submit([3], Sampling(max_tokens=1), Ears())
            time.sleep(0.01)


@pytest.mark.parametrize(("drain", "reason", "tokens"), [(True, "length", 40), (False, "closed", None)])
def test_closing(schedule: Callable[..., Scheduler], drain: bool, reason: str, tokens: int | None) -> None:
    scheduler, first, second = schedule(slots=1), Ears(), Ears()
    first.may_go_on.clear()  # or it may have ended before the scheduler is closed
    for ears in (first, second):
        scheduler.submit([3, 4], Sampling(max_tokens=40), ears)
    assert first.started.wait(SECONDS)
    closing = threading.Thread(target=scheduler.close, kwargs={"drain": drain})
    closing.start()
    wait_until_closed(scheduler)
    first.may_go_on.set()
    closing.join(SECONDS)
    assert [first.wait().reason, second.wait().reason] == [reason, reason]
    assert tokens is None or len(second.tokens) == tokens
    with pytest.raises(ClosedError):
        scheduler.submit([3], Sampling(), Ears())


def test_a_failing_step_ends_its_requests_only(
    schedule: Callable[..., Scheduler], engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, first, second = schedule(has_ends=True), Ears(), Ears()

    def fail(tree: Any, node_ids: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(scheduler.decoder, "verify", fail)
        scheduler.submit([3, 4], Sampling(max_tokens=5), first)
        end = first.wait()
    assert (end.reason, str(end.error)) == ("error", "out of memory")
    scheduler.submit(PROMPTS[1], Sampling(max_tokens=5), second)
    second.wait()
    assert second.tokens == alone(engine_dir, PROMPTS[1], 5)


def test_a_failing_prompt_ends_alone(
    schedule: Callable[..., Scheduler], engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, good, bad, later = schedule(slots=3, has_ends=True), Ears(), Ears(), Ears()
    keep = Lane.keep

    def fail_at_five_tokens(lane: Lane, place: int, length: int, rows: Any) -> None:
        if rows.shape[2] == 5:
            raise RuntimeError("out of memory")
        keep(lane, place, length, rows)

    monkeypatch.setattr(Lane, "keep", fail_at_five_tokens)
    scheduler.submit(PROMPTS[0], Sampling(max_tokens=30), good)
    scheduler.submit([1, 2, 3, 4, 5], Sampling(), bad)
    scheduler.submit(PROMPTS[1], Sampling(max_tokens=9), later)
    assert bad.wait().reason == "error"
    good.wait()
    later.wait()
    assert good.tokens == alone(engine_dir, PROMPTS[0], 30)
    assert later.tokens == alone(engine_dir, PROMPTS[1], 9)


def test_a_listener_that_fails_harms_nobody_else(schedule: Callable[..., Scheduler]) -> None:
    class Broken(Ears):
        def end(self, end: FinishInfo) -> None:
            raise OSError("the client is gone")

    scheduler, ears = schedule(), Ears()
    scheduler.submit([3, 4], Sampling(max_tokens=3), Broken())
    scheduler.submit([3, 4], Sampling(max_tokens=6), ears)
    assert ears.wait().completion_tokens == 6


def test_prompts_that_cannot_be_answered(schedule: Callable[..., Scheduler]) -> None:
    scheduler = schedule(max_length=4)
    for ids, got in (([], "0 tokens"), ([1, 2, 3, 4], "4 tokens")):
        with pytest.raises(ConfigError, match=got):
            scheduler.submit(ids, Sampling(), Ears())


def test_what_is_counted(schedule: Callable[..., Scheduler]) -> None:
    class Counter(Meter):
        first = 0
        later = 0
        reasons: list[str] = []  # noqa: RUF012
        ends: list[FinishInfo] = []  # noqa: RUF012
        most_running = 0

        def first_token(self, seconds: float) -> None:
            self.first += 1
            assert 0 <= seconds < SECONDS

        def tokens(self, count: int, seconds: float, drafts: int) -> None:
            self.later += count
            assert drafts == 0

        def ended(self, end: FinishInfo) -> None:
            self.reasons.append(end.reason)
            self.ends.append(end)

        def load(self, load: Load) -> None:
            self.most_running = max(self.most_running, load.running)
            assert load.running or not load.cache_use
            assert load.cache_use < 1

    counter = Counter()
    scheduler, callbacks = schedule(slots=2, meter=counter), [Ears() for _ in range(5)]
    for ears in callbacks:
        scheduler.submit([3, 4], Sampling(max_tokens=7), ears)
    for ears in callbacks:
        ears.wait()
    scheduler.close()
    assert (counter.first, counter.later, counter.reasons) == (5, 30, ["length"] * 5)
    assert counter.most_running == 2
    parts = [(end.phases.queue, end.phases.prefill, end.phases.decode) for end in counter.ends]
    assert all(part > 0 for end in parts for part in end)
    assert all(sum(part) <= end.seconds for part, end in zip(parts, counter.ends, strict=True))
    assert parts[-1][0] > parts[0][1] + parts[0][2], "the last one waited for the first one's whole answer"
