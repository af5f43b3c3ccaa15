"""Input files of an output: told apart by what the file system says at once, and by hashes once they have been read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from medusa_export.core.artifacts.hashing import WORKERS, sha256
from medusa_export.core.errors import ConfigError
from medusa_export.core.threads import StoppedError


class InputFiles:
    """Hashes files while other code reads them: whichever comes second finds them in the page cache.

    A context manager: at its end, hashing that still runs is given up.

    Args:
        paths: of the files; each counts once.
        digest: what hashes a file; the second argument raises once it should end.

    Attributes:
        marks: path, as given -> size, times and inode. Whatever writes to a file or replaces it changes them: ctime cannot be set.

    Raises:
        ConfigError: a file cannot be read.
    """

    def __init__(self, paths: Iterable[Path], digest: Callable[[Path, Callable[[], None]], str] = sha256) -> None:
        self._paths = tuple(dict.fromkeys(paths))
        self._digest = digest
        self.marks = {str(path): _mark(path) for path in self._paths}
        self._begun: dict[Path, Future[str]] = {}
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._pool = ThreadPoolExecutor(WORKERS, "medusa-export-inputs")

    def __enter__(self) -> InputFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def read(self, path: Path) -> None:
        """Say that a file is about to be read. Waits where hashing is far behind, so that the cache still has what was read.

        Files that are no inputs are ignored. Thread-safe.
        """
        if path in self._begun or str(path) not in self.marks:
            return
        with self._lock:
            before = list(self._begun.values())
            self._begin(path)
        for future in before[: len(before) + 1 - WORKERS]:
            future.exception()

    def hashes(self) -> dict[str, str]:
        """Path, as given -> hexadecimal SHA-256 of every file; waits for those that were not read so far.

        Raises:
            ConfigError: a file cannot be read, or is not what it was at first.
        """
        with self._lock:
            for path in self._paths:
                self._begin(path)
        hashes = {str(path): self._result(path) for path in self._paths}
        for path in self._paths:
            if _mark(path) != self.marks[str(path)]:
                raise ConfigError(str(path), "a file that changed while it was read", "a stable one", "run again")
        return hashes

    def _begin(self, path: Path) -> None:
        if path not in self._begun:
            self._begun[path] = self._pool.submit(self._digest, path, self._stop_point)

    def _result(self, path: Path) -> str:
        try:
            return self._begun[path].result()
        except OSError as error:
            raise _unreadable(path, error) from error

    def _stop_point(self) -> None:
        if self._stopped.is_set():
            raise StoppedError


def _mark(path: Path) -> str:
    try:
        found = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return f"{found.st_size} bytes, inode {found.st_ino}, written {found.st_mtime_ns}, changed {found.st_ctime_ns}"


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(str(path), f"no readable file ({error.strerror})", "an input", "check the path")
