"""Serves a model repository until it is told to end: the launch.sh in it, with the tritonserver of this machine around it."""

from __future__ import annotations

import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from medusa_export.core.errors import ConfigError, OutputError
from medusa_export.engines.serving.triton.hosting.installation import find_installation
from medusa_export.engines.serving.triton.hosting.server import Address, ServerProcess

LAUNCH_FILE, CONFIG_FILE = "launch.sh", "config.pbtxt"
POLL_SECONDS = 0.2


def serve_repository(
    repository: Path, address: Address, *, exit_seconds: int, install: bool, say: Callable[[str], None]
) -> None:
    """Start a server and stay with it. SIGTERM and SIGINT end it: requests in flight finish, for a while; a second one does not wait.

    Args:
        repository: of models, with the launch.sh that medusa-triton wrote.
        exit_seconds: for requests in flight, once it is told to end.
        install: see :func:`~medusa_export.engines.serving.triton.hosting.installation.find_installation`.
        say: is told when it serves, and when it stops. What the server writes goes to stderr.

    Raises:
        ConfigError: no such repository, an address that cannot be had, or no tritonserver.
        OutputError: the server ended by itself.
    """
    launch = repository / LAUNCH_FILE
    if not launch.is_file():
        raise ConfigError(
            str(repository), f"no {LAUNCH_FILE}", "a repository that medusa-triton wrote", "write it, or start another one by hand"
        )  # fmt: skip
    _require_free(address)
    with tempfile.TemporaryDirectory(prefix="medusa-triton-") as folder:
        found = find_installation(Path(folder), install=install)
        process = subprocess.Popen(
            ["bash", str(launch.resolve()), *found.flags, f"--exit-timeout-secs={exit_seconds}"], stdout=2,
            env={**found.variables, **_variables(repository.resolve(), address)}, start_new_session=True,
        )  # fmt: skip
        server = ServerProcess(process, address, exit_seconds)
        with _told_to_end(process) as is_ending:
            try:
                server.wait_ready(float("inf"), is_ending.is_set)
                if not is_ending.is_set():
                    say(f"serving {', '.join(models(repository))} on {address.http}, gRPC on {address.grpc}, "
                        f"metrics at {address.metrics}; SIGTERM or Ctrl-C ends it")  # fmt: skip
                while process.poll() is None and not is_ending.wait(POLL_SECONDS):
                    pass
                if is_ending.is_set():
                    say(f"stopping: up to {exit_seconds} s for requests in flight")
            finally:
                code = server.stop()
        if not is_ending.is_set():
            raise OutputError("tritonserver", f"exit code {code}", "a server that runs", "read what it wrote above")


def models(repository: Path) -> list[str]:
    """The names of the models that a repository has."""
    return sorted(path.parent.name for path in repository.glob(f"*/{CONFIG_FILE}"))


def _variables(repository: Path, address: Address) -> dict[str, str]:
    """How launch.sh is told where to listen."""
    ports = {"HTTP_PORT": address.http_port, "GRPC_PORT": address.grpc_port, "METRICS_PORT": address.metrics_port}
    return {"MODELS": str(repository), "HOST": address.host, **{name: str(port) for name, port in ports.items()}}


def _require_free(address: Address) -> None:
    """Raise ConfigError for a port that somebody has, which Triton says between many other lines, or too late."""
    ports = {"--http-port": address.http_port, "--grpc-port": address.grpc_port, "--metrics-port": address.metrics_port}
    if len(set(ports.values())) < len(ports):
        raise ConfigError(", ".join(ports), ", ".join(map(str, ports.values())), "three ports", "choose another one")
    for flag, port in ports.items():
        if not 0 < port < 1 << 16:
            raise ConfigError(flag, f"{port}", "1 .. 65535", "choose another one")
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((address.host, port))
            except OSError as error:
                got = f"{address.host}:{port} ({error.strerror})"
                raise ConfigError(f"--host, {flag}", got, "a free address", "choose another one") from error


@contextmanager
def _told_to_end(process: subprocess.Popen[bytes]) -> Iterator[Event]:
    """Set by SIGTERM and SIGINT; the second one kills the server."""
    is_ending = Event()

    def end(*_: object) -> None:
        if is_ending.is_set():
            process.kill()
        is_ending.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield is_ending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
