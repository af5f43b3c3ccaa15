"""A file that a command writes at its end, looked at before its work begins."""

from __future__ import annotations

from pathlib import Path

from medusa_export.core.errors import OutputError


def require_output_file(path: Path | None) -> None:
    """Raise OutputError for a path at which no file can be written: a directory, or one in a directory that is not there."""
    if path is None:
        return
    if path.is_dir():
        raise OutputError(str(path), "a directory", "a file to write", "add a file name")
    if not path.resolve().parent.is_dir():
        raise OutputError(str(path), "no such directory", "an existing one", "create it first")
