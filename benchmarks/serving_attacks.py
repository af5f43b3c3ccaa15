"""The attacks of docs/security.md on medusa-serve, one after another, while an honest client goes on asking.

    python benchmarks/serving_attacks.py ENGINE --json attacks.json

The attacker has another address (127.0.0.2) than the honest client. Exits with 1 where an attack is not answered as it should be, or
the honest client gets another answer, or none.
"""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))  # this folder is no package

from serving_servers import PROGRAM, find_url

HOST, ATTACKER, MODEL = "127.0.0.1", "127.0.0.2", "attacked"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SECONDS, ANSWERS = 60.0, 3
JSON = {"Content-Type": "application/json"}
ASKED = {"model": MODEL, "messages": [{"role": "user", "content": "w3 w4 w5"}], "max_tokens": 16}


@dataclass(frozen=True)
class Attack:
    """One of them.

    Attributes:
        run: does it to a port; returns what the server did, in words.
        expected: a pattern for these words.
    """

    run: Callable[[int], str]
    expected: str


def sent(port: int, *parts: bytes) -> socket.socket:
    """A connection of the attacker's on which something was said."""
    sock = socket.create_connection((HOST, port), SECONDS, (ATTACKER, 0))
    for part in parts:
        sock.sendall(part)
    return sock


def outcome(sock: socket.socket) -> str:
    """What comes on a connection: a status and a code, that it was closed, or nothing for a while."""
    answer = http.client.HTTPResponse(sock)
    try:
        answer.begin()
        found = re.search(rb'"code": ?"(\w+)"', answer.read())
    except TimeoutError:
        return "nothing"
    except (OSError, http.client.HTTPException):
        return "closed"
    finally:
        sock.close()
    return f"{answer.status} {found[1].decode()}" if found else f"{answer.status}"


def tally(outcomes: list[str]) -> str:
    """``3 closed, 1 nothing``."""
    return ", ".join(f"{count} {what}" for what, count in sorted(Counter(outcomes).items()))


def raw(head: str, body: bytes = b"", *, path: str = CHAT) -> Callable[[int], str]:
    """Says one request and tells what comes back; ``head`` are header lines besides Host."""
    lines = head if "Host:" in head else f"Host: {HOST}\r\n{head}"
    return lambda port: outcome(sent(port, f"POST {path} HTTP/1.1\r\n{lines}\r\n\r\n".encode(), body))


def posted(body: Any, path: str = CHAT) -> Callable[[int], str]:
    """A whole request that is bad in what it asks."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return raw(f"Content-Type: application/json\r\nContent-Length: {len(data)}", data, path=path)


def many(count: int, *parts: bytes, seconds: float) -> Callable[[int], str]:
    """So many connections that all say the same and then wait."""

    def run(port: int) -> str:
        socks = []
        for _ in range(count):
            socks.append(sent(port, *parts))
        deadline, found = time.monotonic() + seconds, list[str]()
        for sock in socks:
            sock.settimeout(max(deadline - time.monotonic(), 0.01))
            found.append(outcome(sock))
        return tally(found)

    return run


def streams(count: int, *, reads: bool) -> Callable[[int], str]:
    """So many streams, whose client hangs up behind the first bytes, or does not read at all."""
    body = json.dumps({**ASKED, "max_tokens": 100, "ignore_eos": True, "stream": True}).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )

    def run(port: int) -> str:
        socks = [sent(port, head.encode(), body) for _ in range(count)]
        if reads:
            for sock in socks:
                sock.recv(64)
                sock.close()
        else:
            time.sleep(3)
        left = wait_for_idle(port)
        for sock in socks:
            sock.close()
        return f"{left:g} running"

    return run


def flood(count: int) -> Callable[[int], str]:
    """So many requests at once, each on a connection of its own, of many addresses."""
    body = json.dumps({**ASKED, "max_tokens": 60, "ignore_eos": True}).encode()

    def ask(port: int, number: int) -> int:
        connection = http.client.HTTPConnection(HOST, port, SECONDS * 5, (f"127.0.1.{number % 8 + 1}", 0))
        connection.request("POST", CHAT, body, JSON)
        status = connection.getresponse().status
        connection.close()
        return status

    def run(port: int) -> str:
        with ThreadPoolExecutor(count) as pool:
            return tally([f"{status}" for status in pool.map(lambda number: ask(port, number), range(count))])

    return run


def wait_for_idle(port: int) -> float:
    """Requests that are still decoded when they should not be."""
    deadline = time.monotonic() + SECONDS
    while (left := metric(port, "vllm:num_requests_running")) > 1 and time.monotonic() < deadline:  # the honest one
        time.sleep(0.1)
    return max(left - 1, 0)


def metric(port: int, name: str) -> float:
    """One number of the server's."""
    connection = http.client.HTTPConnection(HOST, port, SECONDS)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    found = re.search(rf"^{name}{{.*}} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def made_up_fields(port: int) -> str:
    """Names that clients make up must not fill the server's memory."""
    told = posted({**ASKED, "max_tokens": 1, **{f"field{number}": 1 for number in range(5000)}})(port)
    connection = http.client.HTTPConnection(HOST, port, SECONDS)
    connection.request("GET", "/metrics")
    rows = connection.getresponse().read().decode().count("medusa_passed_over_fields_total{")
    connection.close()
    return f"{told}, {'few' if rows <= 65 else rows} counters"


HALF = b'POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{"model"'
PATTERN = "^(((a{1,99}){1,99}){1,99}){1,99}$"
FORM, JUST_JSON = "Content-Type: text/plain", "Content-Type: application/json"
SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "s", "schema": {"type": "string", "pattern": PATTERN}},
}
ATTACKS = {
    "300 unfinished bodies": Attack(
        many(300, HALF % (CHAT.encode(), HOST.encode()), seconds=40), r"256 408 request_timeout, 44 429 too_many_connections"
    ),
    "400 connections": Attack(many(400, seconds=36), r"400 closed"),
    "half a header": Attack(many(20, f"POST {CHAT} HTTP/1.1\r\nHo".encode(), seconds=36), r"20 closed"),
    "a body of 50 MB": Attack(raw(f"{JUST_JSON}\r\nContent-Length: 52428800"), r"413 request_too_large"),
    "chunks without end": Attack(
        lambda port: chunks(port), r"413 request_too_large|closed"
    ),
    "two lengths": Attack(
        raw(f"{JUST_JSON}\r\nContent-Length: 5\r\nTransfer-Encoding: chunked", b"0\r\n\r\n"), r"400 bad_framing"
    ),
    "another host": Attack(raw(f"Host: evil.example\r\n{JUST_JSON}\r\nContent-Length: 2", b"{}"), r"403 host_not_allowed"),
    "a web page's form": Attack(raw(f"{FORM}\r\nContent-Length: 2", b"{}"), r"415 unsupported_media_type"),
    "a header of 1 MB": Attack(raw("X-Long: " + "a" * 1_000_000), r"4\d\d.*|closed"),
    "no HTTP": Attack(lambda port: outcome(sent(port, b"\x16\x03\x01\x02\x00" * 100)), r"400.*|closed"),
    "bytes that are no text": Attack(posted(b'{"model": "\xff\xfe"}'), r"400 invalid_value"),
    "deep nesting": Attack(posted(b"[" * 100_000), r"400 invalid_value"),
    "a number without end": Attack(posted(b'{"model": "attacked", "seed": ' + b"9" * 100_000 + b"}"), r"400 invalid_value"),
    "a prompt beyond the context": Attack(
        posted({"model": MODEL, "prompt": "w1 " * 50_000}, TEXT), r"400 context_length_exceeded"
    ),
    "1000 stop words": Attack(posted({**ASKED, "stop": [f"s{number}" for number in range(1000)]}), r"400 invalid_value"),
    "128 answers to 128 prompts": Attack(posted({"model": MODEL, "prompt": ["w1"] * 128, "n": 128}, TEXT), r"400 invalid_value"),
    "a grammar that explodes": Attack(posted({**ASKED, "response_format": SCHEMA}), r"400 .*|200"),
    "5000 made-up fields": Attack(made_up_fields, r"200, few counters"),
    "another file than a model": Attack(
        lambda port: outcome(sent(port, b"GET /v1/models/../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n")), r"404 \w+"
    ),
    "100 clients that hang up": Attack(streams(100, reads=True), r"0 running"),
    "64 clients that do not read": Attack(streams(64, reads=False), r"0 running"),
    "600 requests at once": Attack(flood(600), r"\d+ 200, \d+ 429"),
}  # fmt: skip


def chunks(port: int) -> str:
    """Chunks go on until the server has had enough."""
    sock = sent(
        port,
        f"POST {CHAT} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode(),
    )
    try:
        for _ in range(2000):
            sock.sendall(b"8000\r\n" + b" " * 0x8000 + b"\r\n")
    except OSError:
        pass
    return outcome(sock)


class Honest:
    """A client that asks the same again and again, comes again when the server is busy, and notes how long it takes."""

    def __init__(self, port: int) -> None:
        self._port, self._done = port, threading.Event()
        self.expected = self._ask()
        self.seconds, self.wrong = list[float](), list[str]()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def stop(self) -> None:
        """Once it has had some answers during the attack or right behind it."""
        while len(self.seconds) < ANSWERS:
            time.sleep(0.05)
        self._done.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._done.wait(0.05):
            start = time.monotonic()
            try:
                found = self._ask()
            except (OSError, http.client.HTTPException, KeyError) as error:
                found = repr(error)
            self.seconds.append(time.monotonic() - start)
            if found != self.expected:
                self.wrong.append(found)

    def _ask(self) -> str:
        connection = http.client.HTTPConnection(HOST, self._port, SECONDS * 5)
        try:
            while True:
                connection.request("POST", CHAT, json.dumps(ASKED), JSON)
                answer = connection.getresponse()
                body = json.loads(answer.read())
                if answer.status != 429:
                    return str(body["choices"][0]["message"]["content"])
                time.sleep(float(answer.headers["Retry-After"]))
        finally:
            connection.close()


@contextmanager
def served(engine: Path) -> Iterator[int]:
    """The port of a medusa-serve with the limits of its defaults."""
    with tempfile.TemporaryDirectory(prefix="medusa-attacks-") as folder:
        out = Path(folder) / "serve.out"
        command = [str(PROGRAM), "--engine", str(engine), "--port", "0", "--name", MODEL]
        with out.open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield int(find_url(process, out).split(":")[2].partition("/")[0])
        finally:
            process.terminate()
            process.wait()


def main(
    engine: Annotated[Path, typer.Argument(help="Engine directory of an export for ONNX Runtime.")],
    only: Annotated[list[str] | None, typer.Option(help="Only these attacks. Can be repeated.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what happened here.")] = None,
) -> None:
    """Attack a server, and print what it did."""
    rows, table = list[dict[str, Any]](), Table("attack", "the server", "honest answers", "slowest, s")
    with served(engine) as port:
        for name in only or ATTACKS:
            attack, honest = ATTACKS[name], Honest(port)
            start = time.monotonic()
            try:
                found = attack.run(port)
            finally:
                honest.stop()
            is_right = re.fullmatch(attack.expected, found) is not None and not honest.wrong
            rows.append({
                "attack": name, "outcome": found, "seconds": round(time.monotonic() - start, 1), "right": is_right,
                "honest": len(honest.seconds), "slowest": round(max(honest.seconds, default=0.0), 2), "wrong": honest.wrong[:3],
            })  # fmt: skip
            row = rows[-1]
            print(json.dumps(row), file=sys.stderr, flush=True)
            table.add_row(name, found + ("" if is_right else "  WRONG"), f"{row['honest']}", f"{row['slowest']}")
    Console().print(table)
    if json_file:
        json_file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if not all(row["right"] for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the server goes too
    typer.run(main)
