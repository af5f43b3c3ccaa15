"""What all commands share: consoles, a progress bar, signals, and errors as one line and exit code 2."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from medusa_export.core.errors import MedusaExportError

stdout, stderr = Console(highlight=False), Console(stderr=True, highlight=False)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # of a device that output goes to


def command_app() -> typer.Typer:
    """An app whose errors reach :func:`main`."""
    return typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar a stage on stderr, from the first stage on: downloads before it have bars of their own. Nothing on no terminal."""
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=stderr, disable=not stderr.is_terminal)
    with ExitStack() as shown:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if not tasks:
                shown.enter_context(bars)
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield update


@contextmanager
def _unwinding_on_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM raise SystemExit, so that clean-up runs; one that the caller had ignored, as nohup does, stays ignored.

    Yields:
        the signals that came: libraries that are interrupted while they are imported turn SystemExit into their own errors.
    """
    received: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = [number for number, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
    for number in ours:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        for number in ours:
            signal.signal(number, before[number])


def main(app: typer.Typer) -> None:
    """Run a command; the project's errors become one line on stderr and exit code 2, a signal one line and 128 + its number."""
    verbose = bool({"-v", "--verbose"} & set(sys.argv))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    if not verbose:  # or transformers lists the heads of a combined checkpoint as unexpected weights
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with _unwinding_on_signals() as signals:
        _run(app, signals, verbose=verbose)


def _run(app: typer.Typer, signals: list[int], *, verbose: bool) -> None:
    try:
        app(prog_name=Path(sys.argv[0]).stem)
    except BaseException as error:
        succeeded = isinstance(error, SystemExit) and not error.code
        if signals and not succeeded:
            left = next(iter(getattr(error, "__notes__", ())), "nothing half-written is left")
            _fail(f"stopped by {signal.Signals(signals[0]).name}; {left}", 128 + signals[0])
        if isinstance(error, OSError) and error.errno in FULL and error.filename is None:
            _give_up_stdout()
            _fail(f"standard output: {error.strerror}; nothing more can be said there", 2)
        if not isinstance(error, MedusaExportError):
            raise
        if verbose:
            stderr.print_exception()
        _fail(str(error), 2)


def _give_up_stdout() -> None:
    """What is left in the buffer cannot be written when the interpreter ends either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> NoReturn:
    stderr.print(f"error: {message}", style="red", soft_wrap=True, markup=False)
    sys.exit(code)
