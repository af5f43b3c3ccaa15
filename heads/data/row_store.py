"""Answered conversations on the disk: a journal that outlives its writer, and the output that is made of it at the end.

Beside ``data.jsonl`` lies, while it is made, the locked directory ``.data.jsonl.journal`` with ``rows.jsonl``: the finished
rows in the order in which they came. Both files have the same rows, so a run goes on from either.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from medusa_export.core.artifacts.locking import make_locked
from medusa_export.core.artifacts.staging import full_disk_named, sync
from medusa_export.core.errors import OutputError
from medusa_export.core.regular_files import ABSENT, found_instead
from medusa_export.heads.data.conversations import Conversation
from medusa_export.heads.decoding.sampling import Sampling

logger = logging.getLogger(__name__)

Row = dict[str, Any]

KEPT = "answered conversations are kept, and the same command continues"

_TYPES = {"key": str, "messages": list, "model": str, "sampling": dict, "usable": bool, "completion_tokens": int}


@dataclass(frozen=True)
class Maker:
    """What, besides the conversation itself, decides an answer; rows made otherwise are not reused."""

    model: str
    sampling: Sampling

    def made(self, row: Row) -> bool:
        """Whether a row comes from it."""
        return row["model"] == self.model and row["sampling"] == self.sampling.recorded()


class RowStore:
    """Rows by the key of their conversation; only their places in the files are kept in memory. :func:`open_rows` makes it.

    Args:
        out: the output, which may exist.
        directory: the locked journal directory.

    Attributes:
        others: rows that an earlier run made of other conversations, or with another model or sampling.
    """

    def __init__(self, out: Path, directory: Path) -> None:
        self.others = 0
        self._out, self._directory = out, directory
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._journal: BinaryIO = (directory / "rows.jsonl").open("a+b")
        self._files: list[BinaryIO] = [self._journal]

    def load(self, conversations: Iterable[Conversation], maker: Maker) -> None:
        """Find what is there already.

        Raises:
            OutputError: the output is not what this class writes.
        """
        self._cut_torn_line()
        if self._out.exists():
            self._files.append(self._out.open("rb"))
        wanted = {conversation.key for conversation in conversations}
        for file in reversed(self._files):
            self._find_rows(file, wanted, maker)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def add(self, row: Row) -> None:
        """Keep a row; from when this returns, the end of the process does not cost it."""
        self._journal.seek(0, os.SEEK_END)
        self._places[row["key"]] = self._journal, self._journal.tell()
        self._journal.write(_line(row))
        self._journal.flush()

    def rows(self, conversations: Iterable[Conversation]) -> Iterator[Row]:
        """The rows of those conversations that have one, under the ids that they have now."""
        for conversation in conversations:
            if conversation.key in self:
                file, offset = self._places[conversation.key]
                file.seek(offset)
                yield json.loads(file.readline()) | {"id": conversation.id, "source": conversation.source}

    def publish(self, conversations: Iterable[Conversation]) -> None:
        """Write the rows to the output, in the order of the conversations, and remove the journal."""
        complete = self._directory / "complete.jsonl"
        with complete.open("wb") as file:
            file.writelines(map(_line, self.rows(conversations)))
        sync(complete)
        os.replace(complete, self._out)
        sync(self._out.parent)
        shutil.rmtree(self._directory)

    def close(self) -> None:
        """Close the files; remove a journal in which nothing is."""
        for file in self._files:
            file.close()
        if self._directory.exists() and not self.has_journal:
            shutil.rmtree(self._directory)

    @property
    def has_journal(self) -> bool:
        """Whether rows are in the journal that are not in the output yet."""
        path = self._directory / "rows.jsonl"
        return path.exists() and path.stat().st_size > 0

    def _cut_torn_line(self) -> None:
        """What a kill in the middle of a write leaves."""
        self._journal.seek(0)
        end = 0
        for line in self._journal:
            end += len(line) if line.endswith(b"\n") else 0
        self._journal.truncate(end)

    def _find_rows(self, file: BinaryIO, wanted: Set[str], maker: Maker) -> None:
        offset = 0
        file.seek(0)
        for number, line in enumerate(file, start=1):
            row = _parse(line)
            if row is None and file is self._journal:  # a power loss can do that to lines that were not synced
                logger.warning("%s:%d: damaged; that conversation is asked again", file.name, number)
            elif row is None:
                where, action = f"{self._out}:{number}", "choose another output, or move that file away"
                raise OutputError(where, "a line that medusa-data did not write", "its rows alone", action)
            elif maker.made(row) and row["key"] in wanted:
                self._places.setdefault(row["key"], (file, offset))
            else:
                self.others += 1
            offset += len(line)


@contextmanager
def open_rows(out: Path, conversations: Iterable[Conversation], maker: Maker) -> Iterator[RowStore]:
    """The rows that earlier runs left, and room for more. Whatever ends the body, the journal stays unless it was published.

    Args:
        out: JSONL file to write.
        conversations: those that rows are kept of.
        maker: model and sampling that rows have to come from.

    Raises:
        OutputError: another process writes to ``out``, it cannot be written, the disk is full, or something else is there.
    """
    kind = found_instead(out)
    if kind not in (None, ABSENT):
        raise OutputError(str(out), f"{kind}", "a JSONL file, or nothing yet", "choose another output")
    out = out.resolve()  # or a link would be replaced instead of the file that it names
    directory = out.with_name(f".{out.name}.journal")
    if not out.parent.is_dir():
        raise OutputError(str(out), "no such directory", "an existing one", "create it first")
    try:
        descriptor = make_locked(directory, out)
    except OSError as error:
        got = f"no write access ({error.strerror})"
        raise OutputError(str(out.parent), got, "a writable directory", "choose another output") from error
    try:
        with full_disk_named(out):
            store = RowStore(out, directory)
            try:
                store.load(conversations, maker)
                yield store
            except BaseException as error:
                if store.has_journal:
                    error.__notes__ = [
                        *getattr(error, "__notes__", ()),
                        KEPT,
                    ]  # what a command says when a signal ends it
                raise
            finally:
                store.close()
    finally:
        os.close(descriptor)


def _line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def _parse(line: bytes) -> Row | None:
    """The row of a line, or None for anything else."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and all(isinstance(row.get(name), kind) for name, kind in _TYPES.items())
    return row if is_row else None
