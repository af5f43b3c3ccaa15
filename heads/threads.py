"""Tasks on threads that end together: the first failure, or an interrupt of the caller, stops the others."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

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


def cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
