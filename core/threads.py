"""Tasks on threads that end together: the first failure, or an interrupt of the caller, stops the others."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, TypeVar

StopPoint = Callable[[], None]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class StoppedError(Exception):
    """Raised inside a task that has to end because of another one; the caller of :func:`run_all` never sees it."""


def run_all(
    task: Callable[[_Item, StopPoint], _Result],
    items: Iterable[_Item],
    *,
    workers: int,
    initializer: Callable[[], None] | None = None,
) -> list[_Result]:
    """``task(item, stop_point)`` of every item, at most ``workers`` at a time; results in the order of the items.

    Args:
        task: calls its second argument now and then (every few seconds of work): it raises once the task should end.
        initializer: runs first on every thread.

    Raises:
        Exception: that of the first item, in their order, that had failed by then; the others have ended.
    """
    stop = threading.Event()
    failures: dict[int, BaseException] = {}

    def stop_point() -> None:
        if stop.is_set():
            raise StoppedError

    def guarded(index: int, item: _Item) -> _Result:
        stop_point()
        try:
            return task(item, stop_point)
        except BaseException as error:
            if not isinstance(error, StoppedError):
                failures[index] = error
                stop.set()  # here, as this thread may begin the next task before the caller wakes up
            raise

    with ThreadPoolExecutor(workers, "medusa-export", initializer) as pool:
        try:
            futures = [pool.submit(guarded, index, item) for index, item in enumerate(items)]
            wait(futures, return_when=FIRST_EXCEPTION)
            if failures:
                raise failures[min(failures)]
            return [future.result() for future in futures]
        finally:  # signals too: they interrupt the main thread's waiting, not the workers
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


class Follower:
    """Runs tasks in their order on one thread of its own, a few steps behind whoever gives them.

    A context manager: a task's exception comes up at one of the next calls, or at the end of the body if that ends well.

    Args:
        backlog: tasks that may wait; what they hold stays in memory meanwhile.
    """

    def __init__(self, backlog: int) -> None:
        self._backlog = backlog
        self._pool = ThreadPoolExecutor(1, "medusa-export-follower")
        self._waiting: deque[Future[Any]] = deque()

    def __enter__(self) -> Follower:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.catch_up()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def submit(self, task: Callable[..., object], *arguments: Any) -> None:
        """Have ``task(*arguments)`` run; waits while the backlog is full."""
        while len(self._waiting) >= self._backlog:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(task, *arguments))

    def catch_up(self) -> None:
        """Wait until all that was submitted is done."""
        while self._waiting:
            self._waiting.popleft().result()


def run_torch(task: Callable[[_Item, StopPoint], _Result], items: Sequence[_Item]) -> list[_Result]:
    """:func:`run_all` with as many workers as cores, which share torch's own threads."""
    import torch

    workers, before = max(1, min(len(items), cpus())), torch.get_num_threads()
    each = max(1, before // workers)
    try:
        return run_all(task, items, workers=workers, initializer=lambda: torch.set_num_threads(each))
    finally:
        torch.set_num_threads(before)  # the setting of a thread becomes that of all that come after it


def cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
