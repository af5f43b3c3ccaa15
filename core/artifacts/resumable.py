"""An output in the making: its finished parts outlive an interruption, each with the hashes that prove it whole."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from medusa_export.core.artifacts.hashing import FileEntry, WrittenFile, describe, list_files
from medusa_export.core.artifacts.journal import Journal
from medusa_export.core.artifacts.staging import Partial, sync
from medusa_export.core.errors import OutputError

logger = logging.getLogger(__name__)

Files = dict[str, FileEntry]


class ResumableOutput:
    """What :func:`~medusa_export.core.artifacts.manifest.output_directory` gives its body.

    Args:
        partial: the locked directory, perhaps with what an interrupted run left.
        run: JSON of everything that shapes the output. Leftovers of another run are discarded, with a warning.

    Attributes:
        path: the directory to fill; it becomes the output.
        resumed: the parts that an earlier run finished, and their bytes; :meth:`once` checks them when it comes to them.
        values: what was recorded, by key.
    """

    def __init__(self, partial: Partial, run: Mapping[str, Any]) -> None:
        self.path = partial.files
        self.values: dict[str, Any] = {}
        self._parts: dict[str, Files] = {}
        self._claimed: set[str] = set()
        self._partial, self._lock = partial, threading.Lock()
        self._journal = Journal(partial.journal)
        if self._journal.entries[:1] != [{"run": run}]:
            self._start_anew(run)
        for entry in self._journal.entries[1:]:
            self._take(entry)
        self.resumed = {name: sum(file["size"] for file in files.values()) for name, files in self._parts.items()}
        self.path.mkdir(exist_ok=True)
        self._remove_unfinished()

    def write_text(self, name: str, text: str) -> bool:
        """:meth:`run_once` for a text file."""
        return self.run_once(name, lambda path: path.write_text(text, encoding="utf-8"))

    def copy(self, name: str, source: Path) -> bool:
        """:meth:`run_once` for a copy of a file."""
        return self.run_once(name, lambda path: shutil.copyfile(source, path))

    def run_once(self, name: str, make: Callable[[Path], Any]) -> bool:
        """Make one part, unless an interrupted run has; from then on, interruptions do not cost it. Thread-safe.

        Args:
            name: the part's file or directory, relative to :attr:`path` ("trtllm/rank0.safetensors"). No part lies in another.
            make: writes it, at the path that it gets: the parent is there, and nothing else is. It may return a ``WrittenFile``,
                which saves reading the file again.

        Returns:
            Whether ``make`` was called: False when the part was finished, and its files still have the hashes that they had.

        Raises:
            OutputError: the part holds a link.
        """
        path = self.path / PurePosixPath(name)
        with self._lock:
            self._claimed.add(name)
            finished = self._parts.pop(name, None)
        if finished is not None:
            if _is_intact(finished, list_files(path, self.path)):
                self._take({"part": name, "files": finished})
                return False
            logger.warning("%s: changed since it was finished; made again", name)
        _remove(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        made = make(path)
        files = self._described(name, made) if isinstance(made, WrittenFile) else describe(list_files(path, self.path))
        self._sync(path)
        self._append({"part": name, "files": files})
        return True

    def record(self, key: str, value: Any) -> None:
        """Have the manifest keep a JSON value under ``key``; interruptions do not cost it either. Thread-safe."""
        self._append({"key": key, "value": value})

    def finish(self) -> Files:
        """Size and SHA-256 of every file of the output; parts that this run did not ask for are no part of it."""
        for name in self._parts.keys() - self._claimed:
            _remove(self.path / name)
        known = {name: entry for part in self._parts.values() for name, entry in part.items()}
        present = list_files(self.path, self.path)
        known |= describe({name: path for name, path in present.items() if name not in known})
        return {name: known[name] for name in present}

    def _start_anew(self, run: Mapping[str, Any]) -> None:
        if self.path.exists():
            others = _differences(self._journal.entries, run)
            reason = f"other {others[0]}" if others else "a damaged journal"
            logger.warning("%s: left by an interrupted run with %s; discarded", self._partial.path, reason)
        _remove(self.path)
        self._journal.clear()
        self._journal.append({"run": run})
        sync(self._partial.path)

    def _append(self, entry: dict[str, Any]) -> None:
        self._journal.append(entry)
        self._take(entry)

    def _take(self, entry: Mapping[str, Any]) -> None:
        with self._lock:
            if "part" in entry:
                self._parts[entry["part"]] = entry["files"]
                self._partial.has_finished_parts = True
            else:
                self.values[entry["key"]] = entry["value"]

    def _remove_unfinished(self) -> None:
        """Whatever no part holds: written by a process that was killed before it had finished it."""
        finished = {name for files in self._parts.values() for name in files}
        for name, path in list_files(self.path, self.path).items():
            if name not in finished:
                path.unlink()
        for directory in sorted((path for path in self.path.rglob("*") if path.is_dir()), reverse=True):
            if not any(directory.iterdir()):
                directory.rmdir()

    def _described(self, name: str, made: WrittenFile) -> Files:
        size = (self.path / name).lstat().st_size
        if size != made.size:
            raise OutputError(name, f"{size} bytes", f"the {made.size} that were written", "check the disk")
        return {name: {"size": size, "sha256": made.sha256}}

    def _sync(self, path: Path) -> None:
        """Have the disk hold a part, and its name."""
        for item in (path, *path.rglob("*"), *path.parents):
            sync(item)
            if item == self.path:
                return


def _is_intact(finished: Files, present: Mapping[str, Path]) -> bool:
    sizes = {name: entry["size"] for name, entry in finished.items()}
    if any(path.is_symlink() for path in present.values()):
        return False
    return sizes == {name: path.stat().st_size for name, path in present.items()} and describe(present) == finished


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _differences(journal: Sequence[Mapping[str, Any]], now: Mapping[str, Any]) -> list[str]:
    """Where the run that a journal begins with differs from this one: "arguments (tp)"."""
    before = journal[0].get("run", {}) if journal else {}
    return [
        f"{kind} ({name})"
        for kind in before.keys() & now.keys()
        for name in sorted({*before[kind], *now[kind]})
        if before[kind].get(name) != now[kind].get(name)
    ]
