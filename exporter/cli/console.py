"""What all commands share: consoles, a progress bar, signals, and errors as one line with exit code 2, or 3 for a crash."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import typer
from rich.console import Console

from medusa_export.core.errors import MedusaExportError


def plain_console(**options: Any) -> Console:
    """A console that prints text as it is: ids and paths may hold what rich takes for markup, or for the name of an emoji."""
    return Console(highlight=False, markup=False, emoji=False, **options)


stdout, stderr = plain_console(), plain_console(stderr=True)

CRASHED = 3  # exit code
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
FULL = (*NO_SPACE, errno.EIO)  # of a device that output goes to
PRINTING = ("rich", "click", "typer")


def command_app() -> typer.Typer:
    """An app whose errors reach :func:`main`."""
    return typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)


@contextmanager
def progress_bars() -> Iterator[Callable[..., None]]:
    """A bar a stage on stderr, from the first stage on: downloads before it have bars of their own. Nothing on no terminal.

    Yields:
        what takes the stage, how much of it is done, of how much, and a note that stands behind the bar.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    note = TextColumn("{task.fields[note]}")
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
    bars = Progress(*columns, console=stderr, disable=not stderr.is_terminal)
    with ExitStack() as shown:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int, note: str = "") -> None:
            if not tasks:
                shown.enter_context(bars)
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, note="")
            bars.update(tasks[stage], completed=done, total=total, note=note)

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


class StopRequest:
    """Whether Ctrl-C came.

    Attributes:
        is_armed: whether it only asks; before and after that, it stops the command at once.
    """

    def __init__(self) -> None:
        self.is_armed, self.came = False, False


@contextmanager
def stop_on_request() -> Iterator[StopRequest]:
    """The first Ctrl-C asks the command to come to an end, the second one ends it; ignored ones stay ignored."""
    asked, before = StopRequest(), signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_armed and not asked.came:
            asked.came = True
            said = "stopping after this prompt, to report what is finished; Ctrl-C again stops at once"
            stderr.print(said, soft_wrap=True)
        elif callable(before):
            before(number, frame)

    if callable(before):
        signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def main(app: typer.Typer) -> None:
    """Run a command and end the process.

    Exit codes: 0; 1 for what a command found wrong; 2 for the project's errors, one line on stderr; 3 for anything else that is
    raised, one line that names the log with the traceback; 128 + its number for a signal. ``-v`` shows the traceback as well.
    """
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
        if isinstance(error, OSError) and error.errno in FULL and _was_printing(error):
            give_up_stdout()
            _fail(f"standard output: {error.strerror}", 2)
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            _fail(
                f"{error.filename or 'a temporary file'}: got {error.strerror}; expected room for it; free some space",
                2,
            )
        if isinstance(error, (SystemExit, KeyboardInterrupt)):
            raise
        if verbose:
            stderr.print_exception()
        if isinstance(error, MedusaExportError):
            _fail(str(error), 2)
        _fail(_crash_line(error), CRASHED)


def _crash_line(error: BaseException) -> str:
    """What broke, in one line, and where the rest stands."""
    from medusa_export.core.crash_log import write_crash_log

    log = write_crash_log(error, sys.argv)
    place = f"see {log}" if log else "no log could be written: -v shows the traceback"
    what = " ".join(f"{type(error).__name__}: {error}".removesuffix(": ").split())
    return f"crashed, a fault of this program: {what}; {place}"


def _was_printing(error: BaseException) -> bool:
    """Whether a write to standard output failed, and not one to a file: the libraries that print raised it."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).split(".")[0] in PRINTING


def give_up_stdout() -> None:
    """What is left in the buffer cannot be written when the interpreter ends either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> NoReturn:
    stderr.print(f"error: {message}", style="red", soft_wrap=True)
    sys.exit(code)
