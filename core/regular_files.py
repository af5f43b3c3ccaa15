"""What may be read as a file, since a FIFO would wait for a writer forever, and a device may never end."""

from __future__ import annotations

import stat
from pathlib import Path

ABSENT = "no such file or directory"
ENDLESS = ("a FIFO", "a socket", "a device")  # what must not even be opened


_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def found_instead(path: Path) -> str | None:
    """What stands at a path instead of a file, links followed, in words for an error message; None where a file does.

    Links themselves are welcome: the cache of the Hugging Face hub consists of them.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "a link to nothing" if path.is_symlink() else ABSENT
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return f"a path that cannot be read ({getattr(error, 'strerror', None) or error})"
    return None if stat.S_ISREG(mode) else next((kind for is_kind, kind in _KINDS if is_kind(mode)), "no file")
