"""Threads that end together."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import wait

import pytest

from medusa_export.core import threads
from medusa_export.core.threads import Follower, cpus, run_all


def test_results_come_in_the_order_of_the_items() -> None:
    gates = [threading.Event() for _ in range(4)]
    gates[3].set()

    def task(index: int, _: Callable[[], None]) -> int:
        assert gates[index].wait(30)
        if index:
            gates[index - 1].set()  # they end in reverse
        return index * 10

    assert run_all(task, range(4), workers=4) == [0, 10, 20, 30]
    assert run_all(task, [], workers=4) == []


def test_no_more_than_the_workers_at_a_time() -> None:
    lock, running, most = threading.Lock(), 0, 0

    def task(_item: int, _: Callable[[], None]) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.005)
        with lock:
            running -= 1

    run_all(task, range(12), workers=3)
    assert 1 < most <= 3


def test_the_first_failure_stops_the_others() -> None:
    before = set(threading.enumerate())  # those of other tests may still be ending
    started: list[int] = []
    others = threading.Semaphore(0)

    def task(index: int, stop_point: Callable[[], None]) -> None:
        started.append(index)
        if index == 1:
            assert others.acquire(timeout=30)
            raise ZeroDivisionError(f"task {index}")
        others.release()
        while True:  # endless, but for the stop
            stop_point()
            time.sleep(0.001)

    with pytest.raises(ZeroDivisionError, match="task 1"):
        run_all(task, range(50), workers=2)
    assert sorted(started) == [0, 1]
    assert not any(thread.name.startswith("medusa-export") for thread in {*threading.enumerate()} - before)


def test_nothing_is_begun_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even by the thread that failed, while the caller sleeps on."""
    begun: list[int] = []

    def task(index: int, _: Callable[[], None]) -> None:
        begun.append(index)
        raise ZeroDivisionError(f"task {index}")

    monkeypatch.setattr(threads, "wait", lambda futures, return_when: wait(futures))  # for all of them
    with pytest.raises(ZeroDivisionError, match="task 0"):
        run_all(task, range(50), workers=1)
    assert begun == [0]


def test_an_interrupt_of_the_caller_stops_them() -> None:
    def interrupt(*_: object) -> None:
        raise SystemExit(143)

    def task(index: int, stop_point: Callable[[], None]) -> None:
        if index == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        while True:
            stop_point()
            time.sleep(0.001)

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(SystemExit):
            run_all(task, range(3), workers=2)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_initializer() -> None:
    ready: set[int] = set()

    def task(_item: int, _: Callable[[], None]) -> bool:
        return threading.get_ident() in ready

    assert all(run_all(task, range(10), workers=3, initializer=lambda: ready.add(threading.get_ident())))
    assert 1 <= len(ready) <= 3


def test_cpus() -> None:
    assert 1 <= cpus() <= (os.cpu_count() or 1)


def test_a_follower_keeps_the_order_and_its_distance() -> None:
    gate, done = threading.Event(), list[int]()

    def task(index: int) -> None:
        assert gate.wait(30)
        done.append(index)

    with Follower(3) as follower:
        for index in range(3):
            follower.submit(task, index)  # none is done, all may wait
        fourth = threading.Thread(target=follower.submit, args=(task, 3))
        fourth.start()
        fourth.join(0.1)
        assert fourth.is_alive()
        assert done == []
        gate.set()
        fourth.join(30)
        assert done[:1] == [0]
    assert done == [0, 1, 2, 3]


def test_a_followers_failure_comes_up() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Follower(2) as follower:
        follower.submit(fail)
