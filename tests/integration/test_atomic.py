"""Real exports that are killed, interrupted or run out of disk: the output is complete or absent, and the next run cleans up."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from medusa_export.exporter.verify import verify_export

PAGE = 4096

# Imports once (seconds), then every line is one export in a process of its own, through the commands' entry point.
SERVER = """
import json, os, resource, signal, sys
import onnx, torch, transformers.models.auto.tokenization_auto, transformers.models.llama.modeling_llama
from medusa_export.engines import selfcheck
from medusa_export.exporter import cli, export

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    for stream, target in ((0, os.devnull), (1, job["stdout"]), (2, job["stderr"])):
        os.dup2(os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC), stream)
    if job["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"],) * 2)
    if job["trust_the_disk"]:
        export.check_free_space = lambda *_: None
    sys.argv = ["medusa-export", *job["flags"]]
    try:
        cli.export_main()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code or 0)  # tearing torch down takes a second
"""


class Exports:
    """Starts exports, one at a time, and says how they ended."""

    def __init__(self, directory: Path) -> None:
        self.stdout, self.stderr = directory / "stdout", directory / "stderr"
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._answer() == "ready"

    def start(self, flags: list[str], *, largest_file: int = 0, trust_the_disk: bool = False) -> int:
        """The process id of the export."""
        assert self._server.stdin is not None
        job = {"flags": flags, "largest_file": largest_file, "trust_the_disk": trust_the_disk}
        job |= {"stdout": str(self.stdout), "stderr": str(self.stderr)}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return int(self._answer())

    def wait(self) -> int:
        """The exit code, or minus the signal."""
        return int(self._answer())

    def run(self, flags: list[str], **options: Any) -> int:
        self.start(flags, **options)
        return self.wait()

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()

    def stop(self) -> None:
        self._server.communicate()


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exports]:
    server = Exports(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


@pytest.fixture
def flags(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], tiny_heads: Callable[..., Path], tiny_tokenizer: Any
) -> list[str]:
    """An export into ``work/out``, large enough (10 MB) to be caught in the middle of it."""
    size = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 2000, "num_hidden_layers": 2}
    model = tiny_tokenizer(tiny_checkpoint(tmp_path / "model", dtype=torch.float16, **size))
    heads = tiny_heads(tmp_path / "heads", hidden=256, vocab=2000, dtype=torch.float16)
    (tmp_path / "work").mkdir()
    return ["--ckpt", str(model), "--heads", str(heads), "--engine", "none", "--output", str(tmp_path / "work/out")]


def stale(work: Path) -> list[str]:
    return [name for name in os.listdir(work) if name.startswith(".out.tmp-")]


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it never happened"
        time.sleep(0.0005)


def send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it was faster
        os.kill(pid, number)


def is_writing(work: Path) -> bool:
    return any((work / name / "trtllm/rank0.safetensors").exists() for name in stale(work))


def duration(exports: Exports, flags: list[str], work: Path) -> float:
    """Seconds until an undisturbed export has its name; it is moved aside."""
    seconds = []
    for name in ("warm", "reference"):
        start = time.monotonic()
        exports.start(flags)
        wait_until((work / "out").exists)
        seconds.append(time.monotonic() - start)
        assert exports.wait() == 0
        (work / "out").rename(work.parent / name)
    return min(seconds)


def test_kill_9_at_random_moments(exports: Exports, flags: list[str], tmp_path: Path) -> None:
    work, chance = tmp_path / "work", random.Random(20)
    seconds = duration(exports, flags, work)
    killed = 0
    for attempt in range(60):
        if killed == 6:
            break
        pid = exports.start(flags)
        time.sleep(chance.uniform(0, 1) * seconds)
        send(pid, signal.SIGKILL)
        exports.wait()
        if (work / "out").exists():  # it was faster this time: then nothing is missing
            assert verify_export(work / "out") == []
            (work / "out").rename(tmp_path / f"complete{attempt}")
        else:
            killed += 1
            assert os.listdir(work) == stale(work)
    assert killed == 6
    assert exports.run(flags) == 0
    assert os.listdir(work) == ["out"]
    assert verify_export(work / "out") == []
    for file in ("rank0.safetensors", "config.json"):
        assert (work / "out/trtllm" / file).read_bytes() == (tmp_path / "reference/trtllm" / file).read_bytes()


def test_kill_9_while_writing(exports: Exports, flags: list[str], tmp_path: Path) -> None:
    """The moment that leaves most behind: half of the weights are on the disk."""
    work = tmp_path / "work"
    for _ in range(2):
        pid = exports.start(flags)
        wait_until(lambda: is_writing(work))
        send(pid, signal.SIGKILL)
        assert exports.wait() == -signal.SIGKILL
        assert len(stale(work)) == 1  # the one before it is gone
        assert os.listdir(work) == stale(work)
    assert exports.run(flags) == 0
    assert os.listdir(work) == ["out"]
    assert verify_export(work / "out") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(
    number: signal.Signals, exports: Exports, flags: list[str], tmp_path: Path
) -> None:
    work, chance = tmp_path / "work", random.Random(21)
    seconds = duration(exports, flags, work)
    for attempt in range(3):
        pid = exports.start(flags)
        if attempt < 1:
            wait_until(lambda: is_writing(work))
        else:
            wait_until(lambda: stale(work))
            time.sleep(chance.uniform(0, 0.5) * seconds)
        send(pid, number)
        code = exports.wait()
        if code in (0, -number):  # it had been published: complete, or cut off at the interpreter's own end
            assert attempt >= 1
            (work / "out").rename(tmp_path / f"complete{attempt}")
            continue
        assert code == 128 + number
        assert os.listdir(work) == []
        assert exports.stderr.read_text() == f"error: stopped by {number.name}; nothing half-written is left\n"
        assert exports.stdout.read_text() == ""
    assert exports.run(flags) == 0
    assert verify_export(work / "out") == []


def test_an_interrupt_of_the_console_script(flags: list[str], tmp_path: Path) -> None:
    """As a user meets it: fresh process, all imports, the engine too."""
    work, flags = tmp_path / "work", [*flags, "--engine", "onnxruntime"]
    command = [str(Path(sys.executable).with_name("medusa-export")), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: any((work / name / "engine").exists() for name in stale(work)))
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert (process.returncode, out) == (143, "")
    assert err == "error: stopped by SIGTERM; nothing half-written is left\n"
    assert os.listdir(work) == []


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[None]:
    """A file system of that many bytes; skips where it cannot be mounted."""
    path.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "medusa-test", str(path)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"no right to mount a tmpfs: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def sum_sizes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def refused(exports: Exports, work: Path) -> str:
    """The one line of an export that failed and left nothing."""
    (line,) = exports.stderr.read_text().splitlines()
    assert line.startswith("error: ")
    assert (exports.stdout.read_text(), os.listdir(work)) == ("", [])
    return line


def test_a_disk_without_room_is_refused_before_writing(exports: Exports, flags: list[str], tmp_path: Path) -> None:
    with small_disk(tmp_path / "work", 1 << 20):
        assert exports.run(flags) == 2
        assert "GB free; expected 0." in refused(exports, tmp_path / "work")


@pytest.mark.parametrize("engine", ["none", "onnxruntime"])
def test_a_disk_that_fills_up(engine: str, exports: Exports, flags: list[str], tmp_path: Path) -> None:
    """Somebody else takes the room that was there: every kind of writer meets the end of the disk."""
    work, flags = tmp_path / "work", [*flags, "--engine", engine]
    assert exports.run(flags) == 0
    trtllm, whole = (sum_sizes(path) for path in (work / "out/trtllm", work / "out"))
    shutil.rmtree(work / "out")
    sizes = [2 * PAGE, trtllm // 2] if engine == "none" else [(trtllm + whole) // 2, whole - 8 * PAGE]
    for size in sizes:
        with small_disk(work, size):
            assert exports.run(flags, trust_the_disk=True) == 2, size
            line = refused(exports, work)
            assert "got no space left on the disk; expected room" in line or "No space left on device" in line
            assert "free some space" in line


def test_a_file_too_large_for_the_disk(exports: Exports, flags: list[str], tmp_path: Path) -> None:
    """FAT's 4 GB, or ulimit -f; another error than a full disk, and no file system has to be mounted for it."""
    for size in (1000, 100_000):  # the tokenizer, the weights
        assert exports.run(flags, largest_file=size) == 2
        line = refused(exports, tmp_path / "work")
        assert "File too large" in line or "a file larger than the disk's format or ulimit -f allows" in line
    assert exports.run(flags, largest_file=1 << 30) == 0
