"""A file that the user named as an output: complete under its name, or not there; an error names it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medusa_export.core.artifacts.staging import full_disk_named
from medusa_export.core.errors import OutputError
from medusa_export.core.regular_files import ABSENT, found_instead

_SYSTEM = ("/dev/", "/proc/")  # /dev/stdout may be a regular file, which only its descriptor may write


def require_output_file(path: Path | None) -> None:
    """Raise OutputError for a path at which no file can be written: a directory, or one in a directory that is not there."""
    if path is None:
        return
    if path.is_dir():
        raise OutputError(str(path), "a directory", "a file to write", "add a file name")
    if not path.resolve().parent.is_dir():
        raise OutputError(str(path), "no such directory", "an existing one", "create it first")


@contextmanager
def output_file(path: Path) -> Iterator[Path]:
    """What to write instead of ``path``: a file beside it, renamed at the end; a device, or a FIFO, itself.

    Raises:
        OutputError: it cannot be written, or the disk is full; nothing is left then.
    """
    require_output_file(path)
    with _named(path), full_disk_named(path):
        if found_instead(path) not in (None, ABSENT) or str(path.absolute()).startswith(_SYSTEM):
            yield path
            return
        whole = path.resolve()  # or a link would be replaced instead of the file that it names
        scratch = whole.with_name(f".{whole.stem}.{os.getpid()}{whole.suffix}")
        try:
            yield scratch
            if whole.exists():
                shutil.copymode(whole, scratch)
            scratch.replace(whole)
        finally:
            scratch.unlink(missing_ok=True)


def write_output(path: Path, text: str) -> None:
    """Write a text file in UTF-8; see :func:`output_file`."""
    with output_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        got = f"no write access ({error.strerror})"
        raise OutputError(str(path), got, "a file that can be written", "choose another output") from error
