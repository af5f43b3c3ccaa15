"""What goes wrong around a server: clients that leave, die or do not read, stubs that die, a server that is told to stop or dies."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from medusa_export.engines.serving.meter import REASONS
from medusa_export.engines.serving.options import ServingOptions
from medusa_export.engines.serving.triton.hosting.server import Address, TritonServer
from medusa_export.engines.serving.triton.metrics import FLUSH_SECONDS
from medusa_export.engines.serving.triton.repository import write_repository
from tests.integration.triton_fixture import SECONDS, Served, Stream, endless_engine, tensors

QUESTION = "w3 w4 w5"
LONG = {"text_input": QUESTION, "max_tokens": 3900}
SOON = 30.0  # seconds
NOTES_BYTES = 1 << 18
OPTIONS = ServingOptions(max_batch=4, max_queue=60, max_tokens=5, tree_max_batch=2, grace_s=1.5)


@pytest.fixture
def start(
    tiny_engine: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Served]]:
    """Starts a server that a test may end, so that a stub that crashes leaves a dump."""
    monkeypatch.chdir(tmp_path)  # where dumps go
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (limits[1], limits[1]))
    started: list[Served] = []

    def make(exit_seconds: int = 5, *, options: ServingOptions = OPTIONS, **config: Any) -> Served:
        engine, repository, log = (
            endless_engine(tiny_engine, **config),
            tmp_path / "repository",
            tmp_path / "server.log",
        )
        write_repository(engine, repository, options=options)
        with log.open("wb") as output:
            started.append(
                Served(TritonServer(repository, Address.free(), output, exit_seconds=exit_seconds), engine, log)
            )
        started[0].server.wait_ready()
        return started[0]

    try:
        yield make
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, limits)
        for served in started:
            served.server.stop()


def wait_until(is_so: Callable[[], bool], seconds: float = SOON) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pids: list[int]) -> list[int]:
    """Those that are still there, and no zombies."""
    found = []
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
        except OSError:
            continue
    return found


def assert_nothing_is_left(served: Served, stubs: list[int], *, server_may_crash: bool = False) -> None:
    wait_until(lambda: not alive(stubs))
    wait_until(lambda: not served.server.shared_memory())
    dumps = list(Path().glob("core*"))
    assert [dump for dump in dumps if not (server_may_crash and is_of_the_server(dump))] == [], "a stub crashed"


def is_of_the_server(dump: Path) -> bool:
    """By the name of the program, which the notes at the beginning of a dump hold."""
    with dump.open("rb") as file:
        notes = file.read(NOTES_BYTES)
    return b"tritonserver\0" in notes and b"triton_python_b" not in notes


def requests_so_far(served: Served) -> float:
    """That have come: those that ended are counted first, so that none counts twice."""
    ended = sum(served.metrics.read("medusa_requests_ended_total", reason=reason) for reason in REASONS)
    return ended + served.metrics.read("vllm:num_requests_running") + served.metrics.read("vllm:num_requests_waiting")


def test_clients_that_leave_die_or_do_not_read(start: Callable[..., Served], tmp_path: Path) -> None:
    """All others' answers are right, every slot is free in the end, and memory does not grow with what nobody reads."""
    served = start(exit_seconds=1, num_hidden_layers=4)
    stubs, draw = served.server.stubs(), random.Random(0)
    asked = {n: (f"w{n % 20 + 3} w{n % 7 + 3}", 20 + n) for n in range(30)}
    leaving = set(draw.sample(sorted(asked), 9))
    expected = {n: served.offline(*asked[n]) for n in asked if n not in leaving}

    def ask(n: int) -> list[int] | None:
        text, count = asked[n]
        if n in leaving and n % 2:  # hangs up in mid-stream
            events = served.events(text_input=text, max_tokens=3900)
            for _ in range(draw.randint(1, 20)):
                next(events)
            events.close()
            return None
        stream = Stream(served.address.grpc)
        stream.ask(f"{n}", text_input=text, max_tokens=3900 if n in leaving else count, stream=True)
        if n in leaving:
            for _ in range(draw.randint(0, 20)):
                stream.next()
            time.sleep(0.05)
            stream.close(cancel=True)
            return None
        found = stream.collect(1)[f"{n}"][0]
        stream.close()
        return found

    with _killed_client(served), _deaf_clients(served, 3), ThreadPoolExecutor(12) as pool:
        found = {n: tokens for n, tokens in zip(asked, pool.map(ask, asked), strict=True) if tokens is not None}
        assert found == expected
        before = _resident(stubs)
        wait_until(
            lambda: served.metrics.read("vllm:num_requests_running") == 0, SECONDS
        )  # what nobody reads is complete too
        assert _resident(stubs) - before < 50e6
    time.sleep(3 * FLUSH_SECONDS)
    assert served.metrics.read("vllm:num_requests_waiting") == 0
    ended = {reason: served.metrics.read("medusa_requests_ended_total", reason=reason) for reason in REASONS}
    assert sum(ended.values()) == 30 + 3 + 1, ended
    assert ended["length"] + ended["cancelled"] == 34, ended
    assert ended["length"] >= 21, ended
    assert served.generate(text_input=QUESTION, max_tokens=2)[0] == 200
    served.server.stop()
    assert_nothing_is_left(served, stubs)


class _killed_client:  # noqa: N801
    """A process that streams; ended with kill -9 while it does."""

    def __init__(self, served: Served) -> None:
        code = (
            "import sys, urllib.request as u; r = u.urlopen(u.Request(sys.argv[1], sys.argv[2].encode())); "
            "print(r.readline(), flush=True); [line for line in r]"
        )
        url = f"{served.address.http}/v2/models/medusa/generate_stream"
        body = json.dumps({**LONG, "stream": True})
        self._process = subprocess.Popen([sys.executable, "-c", code, url, body], stdout=subprocess.PIPE)

    def __enter__(self) -> None:
        assert self._process.stdout
        assert b"data" in self._process.stdout.readline()
        self._process.kill()

    def __exit__(self, *error: object) -> None:
        assert self._process.wait(SECONDS) == -signal.SIGKILL
        assert self._process.stdout
        self._process.stdout.close()


class _deaf_clients:  # noqa: N801
    """Connections that ask for long answers and never read one."""

    def __init__(self, served: Served, count: int) -> None:
        body = json.dumps({**LONG, "stream": True}).encode()
        head = f"POST /v2/models/medusa/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        self._sockets = [socket.socket() for _ in range(count)]
        for each in self._sockets:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            each.connect((served.address.host, served.address.http_port))
            each.sendall(head.encode() + body)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        for each in self._sockets:
            each.close()


def _resident(pids: list[int]) -> int:
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * resource.getpagesize()


def _ask_in_all_ways(served: Served, count: int, found: dict[str, Any]) -> list[threading.Thread]:
    """The same question over every protocol at once; ``found`` gets tokens, or what the client was told."""
    question = {"text_input": QUESTION, "max_tokens": count}

    def generate(model: str) -> Any:
        status, body = served.generate(model, **question)
        return body["token_ids"] if status == 200 else body["error"]

    def events() -> Any:
        tokens: list[int] = []
        try:
            for event in served.events(**question):
                if "error" in event:
                    return event["error"]
                ids = event["token_ids"]
                tokens += ids if isinstance(ids, list) else [ids]
        except urllib.error.HTTPError as error:  # one that still waits has no stream yet
            return json.loads(error.read())["error"]
        return tokens

    def stream() -> Any:
        stream, tokens = Stream(served.address.grpc), list[int]()
        stream.ask("1", **question, stream=True)
        while True:
            result, error = stream.next()
            if error is None and result.get_response().outputs:
                tokens += result.as_numpy("token_ids")[0].tolist()
            if error is not None or result.get_response().parameters["triton_final_response"].bool_param:
                stream.close()
                return tokens if error is None else error.message()

    def unary() -> Any:
        with grpc.InferenceServerClient(served.address.grpc) as client:
            try:
                return client.infer("medusa_unary", tensors(**question)).as_numpy("token_ids")[0].tolist()
            except InferenceServerException as error:
                return error.message()

    ways: dict[str, Callable[[], Any]] = {
        "generate": lambda: generate("medusa"), "generate unary": lambda: generate("medusa_unary"), "events": events,
        "stream": stream, "infer": unary,
    }  # fmt: skip

    def note(name: str) -> None:
        try:
            found[name] = ways[name]()
        except Exception as error:  # a connection that ends is what the tests look for
            found[name] = repr(error)

    threads = [threading.Thread(target=note, args=(name,), daemon=True) for name in ways]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize(("count", "grace_s", "ends"), [(400, 25, "answered"), (3900, 1, "told")])
def test_a_server_that_is_told_to_stop(count: int, grace_s: float, ends: str, start: Callable[..., Served]) -> None:
    """What can be finished is; the others hear why not. Nothing is left. So many layers that answers take seconds on any machine."""
    served = start(exit_seconds=30, options=replace(OPTIONS, grace_s=grace_s), num_hidden_layers=48)
    stubs, found = served.server.stubs(), dict[str, Any]()
    expected = served.offline(QUESTION, count) if ends == "answered" else "the server is stopping"
    threads = _ask_in_all_ways(served, count, found)
    wait_until(lambda: requests_so_far(served) == 5)
    served.server.process.terminate()
    for thread in threads:
        thread.join(SECONDS)
    assert found == dict.fromkeys(found, expected)
    assert len(found) == 5
    assert served.server.process.wait(SECONDS) == 0
    assert_nothing_is_left(served, stubs)


@pytest.mark.parametrize("model", ["medusa", "medusa_unary"])
def test_a_stub_that_dies_ends_the_server(model: str, start: Callable[..., Served]) -> None:
    """So that whoever started it starts it again; by itself it would stay "ready" and never answer."""
    served = start()
    stubs, found = served.server.stubs(), dict[str, Any]()
    (stub,) = [pid for pid in stubs if f"/{model}/1/" in Path(f"/proc/{pid}/cmdline").read_text()]
    threads = _ask_in_all_ways(served, 3900, found)
    wait_until(lambda: served.metrics.read("vllm:num_requests_running") > 0)
    os.kill(stub, signal.SIGKILL)
    wait_until(lambda: served.server.process.poll() is not None)
    assert not served.server.is_ready()
    for thread in threads:
        thread.join(SOON)
    assert len(found) == 5, "a client waits for ever"
    assert f"stub {stub} has died" in served.log.read_text(errors="replace")
    # Triton 2.51 sometimes crashes then, which ends it too.
    assert_nothing_is_left(served, stubs, server_may_crash=True)


def test_a_server_that_is_killed_leaves_nothing(start: Callable[..., Served]) -> None:
    served = start()
    stubs, found = served.server.stubs(), dict[str, Any]()
    threads = _ask_in_all_ways(served, 3900, found)
    wait_until(lambda: served.metrics.read("vllm:num_requests_running") > 0)
    assert served.server.shared_memory()
    served.server.process.kill()
    served.server.process.wait()
    assert_nothing_is_left(served, stubs)
    for thread in threads:
        thread.join(SOON)
    assert len(found) == 5
