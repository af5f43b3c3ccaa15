"""A file of JSON lines that outlives its writer: each, after a checksum, is on the disk before the next step."""

from __future__ import annotations

import json
import os
import threading
import zlib
from pathlib import Path
from typing import Any


class Journal:
    """Appends to a journal, after what an earlier process left in it.

    Args:
        path: the file; made when there is none. From the first line that is not whole on, it is cut off.

    Attributes:
        entries: the lines, this process's own included.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self._lock = threading.Lock()
        if path.exists():
            os.truncate(path, self._read())

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line; when this returns, the disk has it. Thread-safe."""
        text = json.dumps(entry).encode()
        line = b"%08x %s\n" % (zlib.crc32(text), text)
        with self._lock, self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            self.entries.append(entry)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self.path.unlink(missing_ok=True)
            self.entries.clear()

    def _read(self) -> int:
        """Fill :attr:`entries`; returns how many bytes of the file they take."""
        valid = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            entry = _parse(line)
            if entry is None:
                break
            self.entries.append(entry)
            valid += len(line)
        return valid


def _parse(line: bytes) -> dict[str, Any] | None:
    """The line's object, or None for what a kill, a power loss or a bad disk made of one."""
    checksum, _, text = line.partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text[:-1]):
        return None
    entry: dict[str, Any] = json.loads(text)
    return entry
