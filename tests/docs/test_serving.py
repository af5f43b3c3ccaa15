"""The commands of docs/serving.md, run as they stand there: only the engine, the port and the key's variable are others."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from medusa_export.engines.serving.openai.protocol.errors import REFUSALS, UNFINISHED
from medusa_export.engines.serving.openai.protocol.fields import CHAT, COMPLETIONS
from medusa_export.engines.serving.triton.hosting.installation import pinned
from medusa_export.engines.serving.triton.hosting.server import Address, ServerProcess
from tests.integration.openai_fixture import Served
from tests.integration.triton_fixture import endless_engine

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
PORT, NAME = "8000", "smollm2"
PROGRAMS = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NO_PROXY": "127.0.0.1"}


def block(name: str) -> str:
    """The code between ``<!-- name -->`` and ``<!-- end -->``."""
    found = re.search(rf"<!-- {name} -->\n```\w+\n(.*?)```\n<!-- end -->", DOCUMENT, flags=re.DOTALL)
    assert found, name
    return found[1]


def flags(command: str) -> list[str]:
    """Of a medusa-serve command, but those that the test has others for."""
    program, *words = shlex.split(command)
    assert program == "medusa-serve"
    pairs = dict(zip(words[::2], words[1::2], strict=True))
    assert pairs.pop("--engine") == "quickstart/out/engine"
    pairs.pop("--port", None)
    return [word for pair in pairs.items() for word in pair]


@pytest.fixture
def served(tiny_engine: Callable[..., Any], tmp_path: Path) -> Iterator[Served]:
    server = Served(endless_engine(tiny_engine), tmp_path, *flags(block("serve")))
    yield server
    assert server.stop() == 0


def test_the_commands(served: Served) -> None:
    port = served.url.split(":")[2].split("/")[0]
    client = block("client").replace(PORT, port)
    assert client != block("client")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(client, "docs/serving.md", "exec"), {})
    text = served.offline([{"role": "user", "content": "Why is the sky blue?"}], 40)[0]
    assert printed.getvalue().count(text) == 2, "whole and streamed"
    assert "'tokens_per_step': " in printed.getvalue()
    if shutil.which("curl") is None:
        pytest.skip("no curl: only the client was tried")
    script = "set -e\n" + block("ask").replace(f":{PORT}", f":{port}")
    environment = {**os.environ, "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60, env=environment, check=True)
    assert json.loads(done.stdout.partition("data: ")[0])["choices"][0]["message"]["content"] == text
    assert done.stdout.count("data: [DONE]") == 1
    assert '{"status":"ok"}' in done.stdout
    assert f'vllm:generation_tokens_total{{model_name="{NAME}"}} 140.0' in done.stdout


@pytest.fixture
def folder(tiny_engine: Callable[..., Any], tmp_path: Path) -> Path:
    """A directory in which Triton's commands can be run as they stand."""
    export = tmp_path / "quickstart" / "out"
    export.mkdir(parents=True)
    shutil.copytree(endless_engine(tiny_engine), export / "engine")
    return tmp_path


@contextlib.contextmanager
def running(command: str, folder: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A server that is told to end, and ends well, with all that it started."""
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, shell=True, cwd=folder, env=PROGRAMS | variables, text=True, stdout=subprocess.PIPE, stderr=log
        )
    try:
        yield process
        process.terminate()
        assert process.wait(60) == 0, (folder / "server.log").read_text()[-2000:]
    finally:
        process.kill()
        process.wait()


def asked(port: int, folder: Path) -> str:
    """What the documented questions are answered with."""
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    script = "set -e\n" + block("ask-triton").replace(f":{PORT}", f":{port}")
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60, env=PROGRAMS, check=False)
    assert done.returncode == 0, done.stderr + (folder / "server.log").read_text()[-2000:]
    return done.stdout


def test_the_commands_for_triton(folder: Path) -> None:
    write, verify, serve = block("triton").splitlines()
    subprocess.run(write, shell=True, cwd=folder, env=PROGRAMS, check=True, capture_output=True)
    at = Address.free()
    ports = f" --http-port {at.http_port} --grpc-port {at.grpc_port} --metrics-port {at.metrics_port}"
    with running(f"exec {serve}{ports}", folder) as server:
        assert server.stdout is not None
        ready = server.stdout.readline()
        assert ready.startswith(
            f"serving medusa, medusa_unary on {at.http}, gRPC on {at.grpc}, metrics at {at.metrics};"
        )
        answers = asked(at.http_port, folder)
        assert answers.count('"finish_reason":"length"') == 3
    assert "stopping" in server.stdout.read()
    verified = subprocess.run(verify, shell=True, cwd=folder, env=PROGRAMS, capture_output=True, text=True, check=False)
    assert verified.returncode == 0, f"after use: {verified.stdout}"
    found = pinned(folder / "pinned")
    variables = {name: found.variables[name] for name in ("LD_LIBRARY_PATH", "PATH", "TMPDIR")}
    variables |= {"HTTP_PORT": f"{at.http_port}", "GRPC_PORT": f"{at.grpc_port}", "METRICS_PORT": f"{at.metrics_port}"}
    with running(f"exec {block('launch').strip()} {' '.join(found.flags)}", folder, **variables) as server:
        ServerProcess(server, at, 10).wait_ready()  # type: ignore[arg-type]
        assert len(asked(at.http_port, folder)) == len(answers)


def test_the_command_with_a_key() -> None:
    export, command = block("key").splitlines()
    variable = export.removeprefix("export ").partition("=")[0]
    assert flags(command) == ["--host", "0.0.0.0", "--api-key-env", variable]


def test_every_field_and_code_is_in_the_tables() -> None:
    first = [
        line.split("|")[1]
        for line in DOCUMENT.split("### What a request may say", 1)[1].splitlines()
        if line[:1] == "|"
    ]
    fields = set(re.findall(r"`([a-z_]+)(?:\.[a-z_]+)?`", " ".join(first)))
    assert fields >= CHAT.readers.keys() | COMPLETIONS.readers.keys()
    codes = {refusal.code for refusal in (*REFUSALS.values(), *UNFINISHED.values())} - {"cancelled"}
    assert all(f"`{code}`" in DOCUMENT for code in codes)
