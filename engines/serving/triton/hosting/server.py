"""A tritonserver in a process of its own: where it listens, when it is ready, and how it ends."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from medusa_export.core.errors import OutputError
from medusa_export.engines.serving.triton.hosting.installation import pinned

START_SECONDS, EXIT_SECONDS, POLL_SECONDS = 120.0, 30, 0.1
MARGIN_SECONDS = 5.0  # for a server that is slow to end
SHARED_MEMORY = Path("/dev/shm")
STACK_BYTES = 256 << 20


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002

    @property
    def http(self) -> str:
        """URL of the HTTP endpoint."""
        return f"http://{self.host}:{self.http_port}"

    @property
    def grpc(self) -> str:
        """Address of the gRPC endpoint."""
        return f"{self.host}:{self.grpc_port}"

    @property
    def metrics(self) -> str:
        """URL of the metrics."""
        return f"http://{self.host}:{self.metrics_port}/metrics"

    @classmethod
    def free(cls) -> Address:
        """Three free ports of the loopback."""
        sockets = [socket.socket() for _ in range(3)]
        try:
            for item in sockets:
                item.bind(("127.0.0.1", 0))
            return cls("127.0.0.1", *(item.getsockname()[1] for item in sockets))
        finally:
            for item in sockets:
                item.close()


class ServerProcess:
    """A tritonserver that runs.

    Args:
        process: it, in a session of its own, whose id is the process's.
        exit_seconds: that it gives to requests in flight when it is told to end.
    """

    def __init__(self, process: subprocess.Popen[bytes], address: Address, exit_seconds: float) -> None:
        self.process, self.address, self._exit_seconds = process, address, exit_seconds

    def wait_ready(self, seconds: float = START_SECONDS, is_cancelled: Callable[[], bool] = lambda: False) -> None:
        """Return when all models are loaded and metrics can be read, or nobody waits for that any more.

        Raises:
            OutputError: the server ended, or took too long; its log says why.
        """
        deadline = time.monotonic() + seconds
        while not is_cancelled() and not (self.is_ready() and _is_fine(self.address.metrics)):  # that one opens last
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                got = f"exit code {self.process.returncode}"
                raise OutputError("tritonserver", got, "a server that is ready", "read what it wrote above")
            time.sleep(POLL_SECONDS)

    def is_ready(self) -> bool:
        """Whether the server and all models say so."""
        return _is_fine(f"{self.address.http}/v2/health/ready")

    def stop(self) -> int:
        """Have the server finish what is in flight and end. Returns its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                # With a stream that a client holds open, Triton 2.51 does not end.
                self.process.wait(self._exit_seconds + MARGIN_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._kill_left()
        return self.process.returncode

    def _kill_left(self) -> None:
        """Stubs outlive a server that was killed."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


class TritonServer(ServerProcess):
    """The pinned tritonserver on a repository, without its launch.sh, for tests and benchmarks; :meth:`stop` leaves nothing of it.

    Args:
        repository: of models.
        log: the server's output goes there.
        exit_seconds: that requests in flight get when it is stopped.
    """

    def __init__(
        self, repository: Path, address: Address, log: IO[bytes] | None = None, *, exit_seconds: int = EXIT_SECONDS
    ) -> None:
        self._prefix = f"medusa_{uuid.uuid4().hex[:12]}"  # of the shared memory
        self._folder = Path(tempfile.mkdtemp(prefix="medusa-triton-"))
        try:
            found = pinned(self._folder)
            process = subprocess.Popen(
                [str(found.program), *found.flags, *self._flags(repository.resolve(), address, exit_seconds)],
                stdout=log, stderr=subprocess.STDOUT if log else None, env=found.variables, start_new_session=True,
                preexec_fn=_deepen_stack,
            )  # fmt: skip
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        super().__init__(process, address, exit_seconds)

    def stubs(self) -> list[int]:
        """Process ids of the python backend's stubs."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _parent_and_name(entry) == (self.process.pid, "triton_python_b"):
                found.append(int(entry.name))
        return sorted(found)

    def shared_memory(self) -> list[Path]:
        """What the server and its stubs have in /dev/shm."""
        return sorted(SHARED_MEMORY.glob(f"{self._prefix}*"))

    def stop(self) -> int:
        """As the base's, and remove what is left of it."""
        code = super().stop()
        for path in self.shared_memory():
            path.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        return code

    def _flags(self, repository: Path, at: Address, exit_seconds: int) -> list[str]:
        flags = {
            "model-repository": repository,
            "backend-config": f"python,shm-region-prefix-name={self._prefix}",
            "http-address": at.host, "http-port": at.http_port,
            "grpc-address": at.host, "grpc-port": at.grpc_port,
            "metrics-address": at.host, "metrics-port": at.metrics_port,
            "exit-timeout-secs": exit_seconds,
        }  # fmt: skip
        return ["--disable-auto-complete-config", *(f"--{name}={value}" for name, value in flags.items())]


def _deepen_stack() -> None:
    """Triton 2.51 recurses through an HTTP body: with the usual 8 MB, one of 4 MB ends the server (triton server issue 5840)."""
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    limit = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (limit, hard))


def _parent_and_name(process: Path) -> tuple[int, str]:
    """Of an entry in /proc."""
    try:
        name, _, rest = (process / "stat").read_text().partition("(")[2].rpartition(")")
    except OSError:  # it has just ended
        return 0, ""
    state, parent = rest.split()[:2]
    return (0, "") if state == "Z" else (int(parent), name)


def _is_fine(url: str) -> bool:
    """Whether it is answered, with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
