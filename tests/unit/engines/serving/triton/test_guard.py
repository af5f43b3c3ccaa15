"""What a stub's guard sees: its server's endpoint, marks of stubs that are gone, a directory that is not its own. No server runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from medusa_export.core.errors import OutputError
from medusa_export.engines.serving.triton import guard as triton_guard
from medusa_export.engines.serving.triton import health as triton_health
from medusa_export.engines.serving.triton.guard import SHARED_MEMORY, Guard
from medusa_export.engines.serving.triton.health import Health, http_port, listening


class Endpoint(BaseHTTPRequestHandler):
    """A stand-in for Triton's: alive, or hanging up on everybody as it does while it stops."""

    hangs_up = False

    def do_GET(self) -> None:
        if not Endpoint.hangs_up:
            self.send_response(200 if self.path == "/v2/health/live" else 404)
            self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    Endpoint.hangs_up = False
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_server_that_stops_hangs_up(endpoint: HTTPServer) -> None:
    health, other = (Health(os.getpid(), endpoint.server_port + delta) for delta in (0, 1))
    assert endpoint.server_address in listening(os.getpid())
    assert [health.hangs_up() for _ in range(3)] == [False] * 3
    Endpoint.hangs_up = True
    assert health.hangs_up()
    assert not other.hangs_up(), "nobody listens there"


def test_a_server_that_is_slow_does_not_hang_up(endpoint: HTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Health(os.getpid(), endpoint.server_port)
    monkeypatch.setattr(triton_health, "SECONDS", 0.05)
    monkeypatch.setattr(Endpoint, "do_GET", lambda self: time.sleep(0.3))
    assert not slow.hangs_up()
    assert listening(2**22 + 1) == []  # no such process


@pytest.mark.parametrize(("flags", "port"), [(["--http-port=81"], 81), (["--http-port", "82"], 82), ([], 8000)])
def test_the_port_that_a_server_was_told(flags: list[str], port: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "print('here', flush=True); input()", *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == b"here\n"  # before that, its command line may not be there yet
        assert http_port(process.pid) == port
    finally:
        process.kill()
        process.communicate()


def test_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub's mark is there while its model is loaded; another process's that is no child of the server counts as dead."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(triton_guard, "POLL_SECONDS", 60.0)
    guard = Guard()
    (folder,) = tmp_path.iterdir()
    assert [mark.name for mark in folder.iterdir()] == [str(os.getpid())]
    sibling = folder / f"{os.getpid()}"
    assert triton_guard.is_stub_of(os.getppid(), sibling)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    mark = folder / f"{ended.pid}"
    mark.touch()
    assert ended.wait() == 0
    assert not triton_guard.is_stub_of(os.getpid(), mark)
    mark.unlink()
    assert triton_guard.is_stub_of(os.getpid(), mark), "one that has taken its mark away has ended as it should"
    guard.close()
    assert not folder.exists()


def test_a_stub_without_a_processor_says_so() -> None:
    """Before Triton gives it up, which it does after a second; its guard wakes late by a little on any busy machine."""
    assert not triton_guard.stall(0.25)
    assert not triton_guard.stall(1.2)
    assert "2.5 s" in triton_guard.stall(2.75)


@pytest.mark.slow
def test_a_stub_that_is_frozen_ends_with_its_server(tmp_path: Path) -> None:
    """As one that waits for a server that has died: none of its threads runs. Stand-ins for both."""
    memory = SHARED_MEMORY / f"medusa-export-test-{os.getpid()}"
    memory.touch()
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert server.stdout
    stub = int(server.stdout.readline())
    watchdog = triton_guard.watch(server.pid, stub, memory.name)
    os.kill(stub, signal.SIGSTOP)
    time.sleep(1.2)
    assert watchdog.poll() is None
    assert memory.exists()
    server.kill()
    server.wait()
    server.stdout.close()
    watchdog.wait(10)
    assert not memory.exists()
    assert not Path(f"/proc/{stub}").exists() or triton_guard.process_stat(stub)[0] == "Z"


@pytest.mark.parametrize("kind", ["open to others", "a link"])
def test_a_directory_of_somebody_else_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its marks say which processes and which shared memory go."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    started = triton_guard.process_stat(os.getppid())[19]
    folder = tmp_path / f"medusa-export-{os.getppid()}-{started}"
    if kind == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(OutputError, match="another user's"):
        Guard()
