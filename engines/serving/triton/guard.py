"""Watches over a stub of Triton's python backend: a server that cannot go on is ended, and no process or memory outlives the server.

What tritonserver 2.51 does by itself, as it was seen: when a stub dies, server and model stay "ready", requests in flight of a
decoupled model never end, and new ones are refused for good. When the server dies, a stub may stay, with its shared memory.
"""

from __future__ import annotations

import logging
import os
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from medusa_export.core.errors import OutputError
from medusa_export.engines.serving.triton.health import Health, http_port

POLL_SECONDS = 0.25
# Triton 2.51 gives up a stub that shows no life for a second while a request is handed to it, and frees memory that the stub still
# works with (StubLauncher::ReceiveMessageFromStub, read in its sources): one of both ends soon after, by a segmentation fault or a
# lock_exception.
STALL_SECONDS = 1.0
SHARED_MEMORY = Path("/dev/shm")
# A call into Triton that waits for a server which has just died holds Python's lock, so that no thread of the stub runs any more.
WATCHDOG = """
while read -r pid name state parent rest < "/proc/$2/stat" && [ "$parent" = "$1" ]; do sleep 1; done
sleep 1; kill -9 "$2"; [ -z "$3" ] || rm -f "/dev/shm/$3"
"""

logger = logging.getLogger(__name__)


class Guard:
    """A thread in a stub.

    Every stub leaves a mark while its model is loaded: a file with its process id as name, the name of its shared memory in it.
    A mark without its process is a stub that died.

    Args:
        on_stop: called once, when the server has begun to stop, of which Triton does not tell its models: from then on it hangs up on
            new HTTP connections. It must not block.

    Raises:
        OutputError: another user's directory where the marks belong.
    """

    def __init__(self, on_stop: Callable[[], None] = lambda: None) -> None:
        self._server, self._on_stop = os.getppid(), on_stop
        started = process_stat(self._server)[19]  # a process id alone may have been another server's
        self._folder = Path(tempfile.gettempdir()) / f"medusa-export-{self._server}-{started}"
        _own(self._folder)
        self._mark = self._folder / f"{os.getpid()}"
        memory = _shared_memory()
        self._mark.write_text(memory, encoding="utf-8")
        self._watchdog = watch(self._server, os.getpid(), memory)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, name="medusa-export-guard", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The model is unloaded: from here on its end is none of the others' concern."""
        self._done.set()
        self._thread.join()
        self._watchdog.kill()
        self._watchdog.wait()
        self._mark.unlink(missing_ok=True)
        self._leave()

    def _work(self) -> None:
        health, is_stopping = Health(self._server, http_port(self._server)), False
        before = time.monotonic()
        while not self._done.wait(POLL_SECONDS):
            if why := stall(time.monotonic() - before):
                logger.warning("%s", why)
            if os.getppid() != self._server:
                self._end("the server has ended")
            if dead := [mark for mark in self._marks() if not is_stub_of(self._server, mark)]:
                os.kill(self._server, signal.SIGKILL)  # told to stop, it would wait for answers that never come
                self._end(f"stub {dead[0].name} has died; the server cannot go on without it and was ended")
            if not is_stopping and health.hangs_up():
                is_stopping = True
                self._on_stop()
            before = time.monotonic()

    def _marks(self) -> list[Path]:
        return list(self._folder.glob("[0-9]*"))

    def _end(self, why: str) -> None:
        """FinishInfo this process; shared memory of the server's stubs goes too."""
        logger.error("%s", why)
        for mark in self._marks():
            try:
                name = mark.read_text(encoding="utf-8")
            except FileNotFoundError:  # another stub was faster
                continue
            if name:
                (SHARED_MEMORY / Path(name).name).unlink(missing_ok=True)
            mark.unlink(missing_ok=True)
        self._leave()
        os._exit(1)

    def _leave(self) -> None:
        try:
            self._folder.rmdir()
        except OSError:  # others are there still, or were faster
            return


def stall(waited: float) -> str:
    """What to say of a stub that slept ``waited`` seconds where POLL_SECONDS were meant; nothing if that does no harm."""
    late = waited - POLL_SECONDS
    if late < STALL_SECONDS:
        return ""
    return (
        f"this stub stood still for {late:.1f} s; Triton gives up one that has no processor for a second: give it more"
    )


def watch(server: int, stub: int, memory: str) -> subprocess.Popen[bytes]:
    """A process that ends a stub and removes its shared memory when its server has gone.

    Args:
        server: process id.
        stub: process id.
        memory: name of the stub's shared memory.
    """
    command = ["/bin/sh", "-c", WATCHDOG, "medusa-export-watchdog", f"{server}", f"{stub}", memory]
    none = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=none, stdout=none, stderr=none)


def _own(folder: Path) -> None:
    """Make a directory that only this user can write to."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise OutputError(str(folder), "another user's", "a directory of this user alone", "remove it")


def _shared_memory() -> str:
    """The name of this stub's shared memory: its second argument. Empty where this is no stub."""
    arguments = Path("/proc/self/cmdline").read_bytes().split(b"\0")
    name = arguments[2].decode() if len(arguments) > 2 else ""
    return name if "/" not in name and (SHARED_MEMORY / name).is_file() else ""


def is_stub_of(server: int, mark: Path) -> bool:
    """Whether a mark's process lives, or its mark has just gone."""
    try:
        fields = process_stat(int(mark.name))
    except OSError:
        return not mark.exists()
    return (fields[0] != "Z" and int(fields[1]) == server) or not mark.exists()


def process_stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on: state, parent ... the 20th of them is when it started."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
