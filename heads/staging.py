"""A temporary directory beside the output, removed however its process ends, and renamed when it is complete."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from medusa_export.heads.errors import MedusaExportError, OutputError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # EFBIG: FAT's 4 GB a file, or ulimit -f
_NO_SPACE_TEXTS = tuple(os.strerror(number) for number in _NO_SPACE)  # safetensors and torch pass only the text on


@contextmanager
def temporary_beside(out: Path) -> Iterator[Path]:
    """A locked sibling of ``out``, removed at the end if it is still there, after those that dead processes left.

    The kernel drops a lock with its process, so an unlocked sibling is stale. Process ids would not tell: they repeat,
    and two containers that share a disk do not see each other's.

    Raises:
        OutputError: the parent is a file or cannot be written.
    """
    temporary = out.parent / f".{out.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    lock = None
    try:
        lock = _make_locked(temporary, out)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _unlock(lock)


def _make_locked(temporary: Path, out: Path) -> int | None:
    """Remove what is stale and make the temporary directory. Returns the descriptor of its lock."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(out.parent, fcntl.LOCK_EX):  # or another process could take ours for stale before it is locked
            _remove_stale(out)
            temporary.mkdir()
            return _lock(temporary, fcntl.LOCK_EX)
    except OSError as error:
        if _is_full(error):
            raise
        raise OutputError(
            str(out.parent), f"no way to write there ({error.strerror})", "a writable directory", "choose another one"
        ) from error


def publish(temporary: Path, out: Path) -> None:
    """Have the disk hold everything, then give it its name; only an absent or empty ``out`` is replaced."""
    for path in (*temporary.rglob("*"), temporary):
        _sync(path)
    try:
        os.rename(temporary, out)
    except OSError as error:
        if _is_full(error):
            raise
        raise OutputError(
            str(out), f"something that came up meanwhile ({error.strerror})", "nothing there", "look there, run again"
        ) from error
    _sync(out.parent)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM unwinds the stack, so that clean-up runs; a handler that somebody else installed is left alone."""
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


def _remove_stale(out: Path) -> None:
    for path in out.parent.glob(f".{glob.escape(out.name)}.tmp-*"):
        with _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB) as is_stale:
            if is_stale:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(directory: Path, how: int) -> Iterator[bool]:
    """Holds a lock; yields False when somebody else does, or when the file system has no locks."""
    lock = _lock(directory, how)
    try:
        yield lock is not None
    finally:
        _unlock(lock)


def _lock(directory: Path, how: int) -> int | None:
    """An open descriptor that holds the lock, or None."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, how)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
