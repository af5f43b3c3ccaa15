"""A directory that one process at a time may use. The kernel drops a lock with its process, whatever ends it."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

from medusa_export.core.errors import OutputError

logger = logging.getLogger(__name__)

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def make_locked(path: Path, out: Path) -> int:
    """Make the directory, if need be, and lock it for the making of ``out``. Where there are no locks, a warning says so.

    Returns:
        The descriptor that holds the lock until it is closed.

    Raises:
        OutputError: another process holds it.
        OSError: it cannot be made or opened.
    """
    while True:  # more than once when another process removes it meanwhile
        path.mkdir(exist_ok=True)
        if (descriptor := open_directory(path)) is None:
            continue
        try:
            unlockable = _try_lock(descriptor, out)
            if _is_at(path, descriptor):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    if unlockable:
        logger.warning("%s: no file locks there (%s): do not make it twice at the same time", out, unlockable.strerror)
    return descriptor


def require_idle(path: Path, out: Path) -> None:
    """Raise OutputError when another process holds the directory's lock at this moment."""
    try:
        descriptor = open_directory(path)
    except OSError:  # nothing that can be locked: make_locked says why
        return
    if descriptor is None:
        return
    try:
        _try_lock(descriptor, out)
    finally:
        os.close(descriptor)


def open_directory(path: Path) -> int | None:
    try:
        return os.open(path, _OPEN_DIRECTORY)
    except FileNotFoundError:
        return None


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open directory still has its name."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _try_lock(descriptor: int, out: Path) -> OSError | None:
    """Lock, or return why the file system cannot; OutputError when another process holds the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(
            str(out), "another process writing it", "one at a time", "wait for it or choose another directory"
        ) from error
    except OSError as error:  # some network file systems
        return error
    return None
