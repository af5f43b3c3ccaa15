"""Serving a repository, as far as it goes without a server: what is refused, and what a stand-in for tritonserver is started with."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path

import pytest

from medusa_export.core.errors import ConfigError, OutputError
from medusa_export.engines.serving.triton.hosting import installation, serve
from medusa_export.engines.serving.triton.hosting.installation import find_installation
from medusa_export.engines.serving.triton.hosting.serve import models, serve_repository
from medusa_export.engines.serving.triton.hosting.server import Address
from medusa_export.engines.serving.triton.repository import LAUNCH

# Answers what ServerProcess asks, and says what it was started with.
SERVER = """#!{python}
import http.server, json, os, sys, threading
json.dump({{"words": sys.argv[1:], "folder": os.getcwd()}}, open("started.json", "w"))
if os.environ.get("END"):
    sys.exit(3)
class Fine(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def log_message(self, *args): pass
ports = [int(sys.argv[sys.argv.index(name) + 1]) for name in ("--http-port", "--metrics-port")]
servers = [http.server.HTTPServer(("127.0.0.1", port), Fine) for port in ports]
for server in servers: threading.Thread(target=server.serve_forever).start()
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One with a launch.sh, and a tritonserver on the PATH that is none."""
    import sys

    program = tmp_path / "bin" / "tritonserver"
    program.parent.mkdir()
    program.write_text(SERVER.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    path = tmp_path / "repository"
    for model in ("chat_unary", "chat"):
        (path / model).mkdir(parents=True)
        (path / model / "config.pbtxt").write_text("")
    (path / "launch.sh").write_text(LAUNCH)
    return path


def serve_until_told(repository: Path, address: Address) -> list[str]:
    """What is said by a server that is told to end once it is ready."""
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if text.startswith("serving"):
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()

    serve_repository(repository, address, exit_seconds=3, install=False, say=say)
    return said


def test_started_ready_and_ended(repository: Path) -> None:
    import json

    address, before = Address.free(), signal.getsignal(signal.SIGTERM)
    ready, stopping = serve_until_told(repository, address)
    assert ready.startswith(f"serving chat, chat_unary on {address.http}, gRPC on {address.grpc}, metrics at ")
    assert stopping == "stopping: up to 3 s for requests in flight"
    assert signal.getsignal(signal.SIGTERM) is before
    started = json.loads((repository / "started.json").read_text())
    words = started["words"]
    assert started["folder"] == str(repository)
    assert [words[words.index(f"--{name}-address") + 1] for name in ("http", "grpc", "metrics")] == ["127.0.0.1"] * 3
    ports = [words[words.index(f"--{name}-port") + 1] for name in ("http", "grpc", "metrics")]
    assert ports == [f"{address.http_port}", f"{address.grpc_port}", f"{address.metrics_port}"]
    assert words[-1] == "--exit-timeout-secs=3"


def test_a_server_that_ends_by_itself(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("END", "1")
    with pytest.raises(OutputError, match="tritonserver: got exit code 3"):
        serve_repository(repository, Address.free(), exit_seconds=1, install=False, say=lambda text: None)


def test_somebody_has_the_port(repository: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = Address("127.0.0.1", taken.getsockname()[1], 1, 2)
        with pytest.raises(ConfigError, match=r"--host, --http-port: got 127.0.0.1:\d+ \(Address already in use\)"):
            serve_repository(repository, address, exit_seconds=1, install=False, say=lambda text: None)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (Address("127.0.0.1", 70_000, 8001, 8002), "--http-port: got 70000"),
        (Address("127.0.0.1", 8001, 8001, 8002), "expected three ports"),
        (Address("192.0.2.1", 8000, 8001, 8002), "--host, --http-port: got 192.0.2.1:8000"),
    ],
)
def test_addresses(address: Address, message: str, repository: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        serve_repository(repository, address, exit_seconds=1, install=False, say=lambda text: None)


def test_no_repository(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"got no launch.sh; expected a repository that medusa-triton wrote"):
        serve_repository(tmp_path, Address(), exit_seconds=1, install=False, say=lambda text: None)
    assert models(tmp_path) == []


def test_no_server_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "WHEEL", "no_such_wheel")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"tritonserver: got no such program; .* nvidia-pytriton; .* --install"):
        find_installation(tmp_path)


def test_the_wheel_wants_an_old_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "WHEEL", "json")  # a package that is here
    monkeypatch.setattr(installation, "version", lambda package: "2.3.1")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"server environment: got numpy 2\.3\.1; expected below 2"):
        find_installation(tmp_path)


def test_the_one_of_the_path_comes_first(repository: Path, tmp_path: Path) -> None:
    found = find_installation(tmp_path)
    assert (found.program, found.flags) == (tmp_path / "bin" / "tritonserver", ())
    assert serve.LAUNCH_FILE in [path.name for path in repository.iterdir()]
