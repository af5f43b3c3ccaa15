"""The log of a crash, which is a fault of this program: versions, what was asked, the traceback; one file a crash."""

from __future__ import annotations

import os
import platform
import shlex
import tempfile
import traceback
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from medusa_export.core.user_cache import user_cache

FOLDER = "crashes"


def write_crash_log(error: BaseException, command: Sequence[str]) -> Path | None:
    """Write it into the user's cache, or into the directory for temporary files where that does not take it.

    Args:
        error: what nobody caught.
        command: the program and its arguments.

    Returns:
        the file; None where neither place takes one.
    """
    now = datetime.now(timezone.utc)
    text = "\n".join(
        [
            f"time: {now.isoformat(timespec='seconds')}",
            f"command: {shlex.join(command)}",
            f"directory: {os.getcwd()}",
            f"system: {platform.platform()}, Python {platform.python_version()}",
            "",
            "".join(traceback.format_exception(error)),
            *_installed(),
            "",
        ]
    )
    name = f"{Path(command[0]).stem}-{now:%Y%m%dT%H%M%SZ}-{os.getpid()}.log"
    cache = user_cache()
    for folder in (*([cache / FOLDER] if cache else []), Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError:
            continue  # the next place; the caller says so where there is none
        return folder / name
    return None


def _installed() -> list[str]:
    """Every package and its version: which of them matter is known afterwards."""
    found = {(each.metadata["Name"] or "?", each.version) for each in metadata.distributions()}
    return [f"{name} {version}" for name, version in sorted(found, key=lambda pair: pair[0].lower())]
