"""The directory beside an output in which it is made: locked, kept while it is of use, and renamed when it is complete."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from medusa_export.core.artifacts import locking
from medusa_export.core.errors import MedusaExportError, OutputError

KEPT = "finished parts are kept, and the same command continues"
KEPT_BEFORE = "what an earlier run finished is kept"

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # EFBIG: FAT's 4 GB a file, or ulimit -f
_NO_SPACE_TEXTS = tuple(os.strerror(number) for number in _NO_SPACE)  # safetensors and torch pass only the text on


@dataclass
class Partial:
    """The directory in which an output is made.

    Attributes:
        path: ``.{name}.partial`` beside the output.
        has_finished_parts: the next run can go on from what is in it.
    """

    path: Path
    has_finished_parts: bool = False

    @property
    def files(self) -> Path:
        """What becomes the output."""
        return self.path / "files"

    @property
    def journal(self) -> Path:
        """What the next run has to know of them."""
        return self.path / "journal.jsonl"


@contextmanager
def partial_beside(out: Path) -> Iterator[Partial]:
    """A locked directory beside ``out``, as the last process for ``out`` left it; removed at the end.

    It stays when the body was interrupted or met an unexpected error, and it has finished parts: the exception gets a
    note then. The kernel drops a lock with its process, so nothing has to be cleaned up after ``kill -9``.

    Raises:
        OutputError: another process is writing it, or the parent is a file or cannot be written.
    """
    partial = Partial(_partial_path(out))
    descriptor = _make_locked(partial.path, out)
    try:
        yield partial
    except BaseException as error:
        if _can_continue(error) and partial.has_finished_parts and partial.files.is_dir():
            _note(error, KEPT)
            raise
        shutil.rmtree(partial.path, ignore_errors=True)
        raise
    else:
        shutil.rmtree(partial.path, ignore_errors=True)
    finally:
        os.close(descriptor)


@contextmanager
def leftovers_noted(out: Path) -> Iterator[None]:
    """Around what comes before :func:`partial_beside`: an interrupt gets a note when an earlier one has left parts of ``out``."""
    try:
        yield
    except BaseException as error:
        if (
            _was_interrupted(error)
            and not hasattr(error, "__notes__")
            and Partial(_partial_path(out.resolve())).files.is_dir()
        ):
            _note(error, KEPT_BEFORE)
        raise


def require_idle(out: Path) -> None:
    """Raise OutputError when another process is making ``out`` at this moment."""
    out = out.resolve()
    locking.require_idle(_partial_path(out), out)


def _partial_path(out: Path) -> Path:
    return out.parent / f".{out.name}.partial"


def _make_locked(path: Path, out: Path) -> int:
    """The descriptor of the directory's lock."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        descriptor = locking.make_locked(path, out)
        sync(out.parent)
    except OSError as error:
        if _is_full(error):
            raise
        raise OutputError(
            str(out.parent), f"no write access ({error.strerror})", "a writable directory", "choose another one"
        ) from error
    return descriptor


def _note(error: BaseException, text: str) -> None:
    """What ``add_note`` does since Python 3.11."""
    error.__notes__ = [*getattr(error, "__notes__", ()), text]


def _can_continue(error: BaseException) -> bool:
    """Whether the same command may get further: it was cut off, not refused, and the disk has room."""
    if isinstance(error, Exception) and _is_full(error):
        return False
    return not isinstance(error, MedusaExportError) or _was_interrupted(error)


def _was_interrupted(error: BaseException) -> bool:
    """Libraries that are interrupted while they are imported turn SystemExit into errors of their own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (SystemExit, KeyboardInterrupt)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def publish(files: Path, out: Path) -> None:
    """Have the disk hold everything, then give it its name; only an absent or empty ``out`` is replaced."""
    for path in (*files.rglob("*"), files):
        sync(path)
    try:
        os.rename(files, out)
    except OSError as error:
        if _is_full(error):
            raise
        raise OutputError(
            str(out), f"something that appeared meanwhile ({error.strerror})", "nothing there", "look there, run again"
        ) from error
    sync(out.parent)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM unwinds the stack, so that clean-up runs; a handler that the program installed is left alone."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def full_disk_named(out: Path) -> Iterator[None]:
    """Whatever a library raises when the disk is full becomes one OutputError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MedusaExportError) or not _is_full(error):
            raise
        raise OutputError(
            str(out), _what_is_full(error), "room for the whole output", "free some space or choose another disk"
        ) from error


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return True
    return any(text in str(error) for text in _NO_SPACE_TEXTS)


def _what_is_full(error: Exception) -> str:
    too_large = os.strerror(errno.EFBIG) in str(error)
    return "a file larger than the disk's format or ulimit -f allows" if too_large else "no space left on the disk"


def sync(path: Path) -> None:
    """Have the disk hold a file's bytes, or a directory's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
