"""Real exports that are killed, interrupted or run out of disk: the output is complete or absent, and the next run goes on."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from medusa_export.core.artifacts.manifest import output_directory
from medusa_export.core.artifacts.staging import KEPT, KEPT_BEFORE
from medusa_export.exporter.verify.checkpoint import verify_export

PAGE = 4096

# Imports once (seconds), then every line is one export in a process of its own, through the commands' entry point.
SERVER = """
import json, os, resource, signal, sys, threading
import onnx, torch, transformers.models.auto.tokenization_auto, transformers.models.llama.modeling_llama
from medusa_export.engines.verify import selfcheck
from medusa_export.exporter.write import ranks
from medusa_export.exporter.pipeline import export
from medusa_export.exporter.cli import export as cli
from medusa_export.core.artifacts import journal
from medusa_export.core.artifacts import staging

def log_ranks(path):
    write = ranks.write_rank
    def logged(target, checkpoint, spec, scales, rank, *more):
        with open(path, "a") as file:
            file.write(f"{rank}\\n")
        return write(target, checkpoint, spec, scales, rank, *more)
    ranks.write_rank = logged

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_at_line(number, when):
    # Just before that line of the journal is written, in the middle of it, or just after it.
    append, lines, lock = journal.Journal.append, [], threading.Lock()
    def deadly(self, entry):
        with lock:
            lines.append(entry)
            if len(lines) < number:
                return append(self, entry)
            if when == "half":
                with self.path.open("a") as file:
                    file.write('12345678 {"part": "trtl')
            if when == "after":
                append(self, entry)
            die()
    journal.Journal.append = deadly

def die_at_publication(when):
    publish = staging.publish
    def deadly(files, out):
        if when == "after":
            publish(files, out)
        die()
    staging.publish = deadly

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
    log_ranks(job["ranks"])
    if job["die"]:
        globals()[job["die"][0]](*job["die"][1:])
    sys.argv = ["medusa-export", *job["flags"]]
    try:
        cli.export_main()
    except SystemExit as end:
        sys.stdout.flush()
        os._exit(end.code or 0)  # tearing torch down takes a second
"""

ENDS = "end-of-sequence token: </s> (id 2)\n"  # the last that an export says


class Exports:
    """Starts exports, one at a time, and says how they ended."""

    def __init__(self, directory: Path) -> None:
        self.stdout, self.stderr, self._ranks = (directory / name for name in ("stdout", "stderr", "ranks"))
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._answer() == "ready"

    def start(
        self, flags: list[str], *, largest_file: int = 0, trust_the_disk: bool = False, die: Sequence[object] = ()
    ) -> int:
        """The process id of the export.

        Args:
            die: a function of the server, with arguments, after which the export kills itself.
        """
        assert self._server.stdin is not None
        self._ranks.write_text("")
        job: dict[str, Any] = {"flags": flags, "largest_file": largest_file, "trust_the_disk": trust_the_disk}
        job |= {"stdout": str(self.stdout), "stderr": str(self.stderr), "ranks": str(self._ranks), "die": die}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return int(self._answer())

    def wait(self) -> int:
        """The exit code, or minus the signal."""
        return int(self._answer())

    def run(self, flags: list[str], **options: Any) -> int:
        self.start(flags, **options)
        return self.wait()

    @property
    def ranks(self) -> list[int]:
        """Those that the last export began to write, sorted."""
        return sorted(map(int, self._ranks.read_text().split()))

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
    """An export of four ranks into ``work/out``, large enough (10 MB) to be caught in the middle of it."""
    size = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 2000, "num_hidden_layers": 2}
    model = tiny_tokenizer(tiny_checkpoint(tmp_path / "model", dtype=torch.float16, **size))
    heads = tiny_heads(tmp_path / "heads", hidden=256, vocab=2000, dtype=torch.float16)
    (tmp_path / "work").mkdir()
    given = {"ckpt": model, "heads": heads, "engine": "none", "tp": 4, "output": tmp_path / "work/out"}
    return [str(part) for name, value in given.items() for part in (f"--{name}", value)]


PARTIAL = ".out.partial"
PARTS = ["tree.json", "tokenizer", "trtllm/config.json", *(f"trtllm/rank{rank}.safetensors" for rank in range(4))]
GONE = "nothing half-written is left"


def finished(work: Path) -> set[str]:
    """The parts that the journal of an interrupted export names."""
    journal = work / PARTIAL / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
    entries = [json.loads(line.partition(" ")[2]) for line in lines if line.endswith("}\n")]
    return {entry["part"] for entry in entries if "part" in entry}


def contents(out: Path) -> dict[str, bytes]:
    """Every file; of the manifest, what does not depend on the time."""
    found = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    manifest = json.loads(found["medusa.json"])
    return {**found, "medusa.json": json.dumps({**manifest, "created": ""}).encode()}


def check_continued(exports: Exports, flags: list[str], work: Path, reference: dict[str, bytes]) -> None:
    """The same command gives the same bytes as an undisturbed export, and makes no finished rank again."""
    before = finished(work)
    assert exports.run(flags) == 0
    assert os.listdir(work) == ["out"]
    assert contents(work / "out") == reference
    assert exports.ranks == [rank for rank in range(4) if f"trtllm/rank{rank}.safetensors" not in before]
    notice = f"continuing: {len(before)} of {len(PARTS)} parts were finished\n" if before else ""
    assert exports.stderr.read_text() == notice + ENDS


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it never happened"
        time.sleep(0.0005)


def send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it was faster
        os.kill(pid, number)


def is_writing(work: Path) -> bool:
    return any((work / PARTIAL / "files/trtllm").glob("rank*"))


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
    reference = contents(tmp_path / "reference")
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
            assert set(os.listdir(work)) <= {PARTIAL}
    assert killed == 6
    check_continued(exports, flags, work, reference)
    assert verify_export(work / "out") == []


@pytest.mark.parametrize("when", ["before", "half", "after"])
def test_kill_9_at_every_part(when: str, exports: Exports, flags: list[str], tmp_path: Path) -> None:
    """Around the moment that makes a part count, for all of them: no work is lost, and none that is not done is taken for done."""
    work = tmp_path / "work"
    assert exports.run(flags) == 0
    assert exports.ranks == [0, 1, 2, 3]
    reference = contents(work / "out")
    for line in range(1, len(PARTS) + 2):  # the first one says what the run is made from
        shutil.rmtree(work / "out")
        exports.start(flags, die=("die_at_line", line, when))
        assert exports.wait() == -signal.SIGKILL
        assert os.listdir(work) == [PARTIAL]
        assert len(finished(work)) == max(0, line - 1 if when == "after" else line - 2)
        check_continued(exports, flags, work, reference)


def test_kill_9_again_and_again(exports: Exports, flags: list[str], tmp_path: Path) -> None:
    """Every run gets one part further, and no rank is begun more often than it has to be."""
    work, begun = tmp_path / "work", []
    for number in range(1, len(PARTS) + 1):
        exports.start(flags, die=("die_at_line", 2 if number == 1 else 1, "after"))
        assert exports.wait() == -signal.SIGKILL
        assert len(finished(work)) == number
        begun.append(exports.ranks)
    assert exports.run(flags) == 0
    assert exports.ranks == []
    assert verify_export(work / "out") == []
    assert all(1 <= sum(rank in ranks for ranks in begun) <= 4 for rank in range(4))


@pytest.mark.parametrize("when", ["before", "after"])
def test_kill_9_at_publication(when: str, exports: Exports, flags: list[str], tmp_path: Path) -> None:
    work = tmp_path / "work"
    assert exports.run(flags) == 0
    reference = contents(work / "out")
    shutil.rmtree(work / "out")
    exports.start(flags, die=("die_at_publication", when))
    assert exports.wait() == -signal.SIGKILL
    if when == "before":
        check_continued(exports, flags, work, reference)
        assert exports.ranks == []
    else:
        assert contents(work / "out") == reference
        assert exports.run(flags) == 0
        assert exports.stdout.read_text().startswith("up to date: ")


def test_kill_9_while_writing(exports: Exports, flags: list[str], tmp_path: Path) -> None:
    """The moment that leaves most behind: half of the weights are on the disk."""
    work = tmp_path / "work"
    for _ in range(2):
        pid = exports.start(flags)
        wait_until(lambda: is_writing(work))
        send(pid, signal.SIGKILL)
        assert exports.wait() == -signal.SIGKILL
        assert os.listdir(work) == [PARTIAL]
        for path in (work / PARTIAL / "files/trtllm").glob("rank*"):  # as if none had been finished
            path.unlink()
    assert exports.run(flags) == 0
    assert os.listdir(work) == ["out"]
    assert exports.ranks == [0, 1, 2, 3]
    assert verify_export(work / "out") == []


def test_other_arguments_start_anew(exports: Exports, flags: list[str], tmp_path: Path) -> None:
    work = tmp_path / "work"
    exports.start(flags, die=("die_at_line", len(PARTS), "after"))
    assert exports.wait() == -signal.SIGKILL
    assert exports.run([*flags, "--dtype", "bfloat16"]) == 0
    assert exports.ranks == [0, 1, 2, 3]
    line, _ = exports.stderr.read_text().splitlines()
    assert line.startswith("WARNING: ")
    assert line.endswith(f"{PARTIAL}: left by an interrupted run with other arguments (dtype); discarded")
    assert os.listdir(work) == ["out"]
    assert verify_export(work / "out") == []


def test_two_at_once(exports: Exports, flags: list[str], tmp_path: Path) -> None:
    """The second one says so before it has read the first input, and disturbs nothing."""
    work = tmp_path / "work"
    with output_directory(work / "out", inputs={}, arguments={}) as other:
        (other.path / "mine").touch()
        assert exports.run([*flags, "--ckpt", str(tmp_path / "absent")]) == 2
        *_, line = exports.stderr.read_text().splitlines()
        assert line.startswith(f"error: {work / 'out'}: got another process writing it")
        assert exports.stdout.read_text() == ""
    assert sorted(os.listdir(work / "out")) == ["medusa.json", "mine"]
    assert os.listdir(work) == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_finished_parts(
    number: signal.Signals, exports: Exports, flags: list[str], tmp_path: Path
) -> None:
    work, chance = tmp_path / "work", random.Random(21)
    seconds = duration(exports, flags, work)
    for attempt in range(4):
        pid = exports.start(flags)
        if attempt < 1:
            wait_until(lambda: is_writing(work))
        else:
            time.sleep(chance.uniform(0.1, 0.7) * seconds)
        send(pid, number)
        code = exports.wait()
        if code in (0, -number):  # it had been published, or it was cut off at the interpreter's own end
            assert attempt >= 1
            if (work / "out").exists():
                (work / "out").rename(tmp_path / f"complete{attempt}")
            continue
        assert code == 128 + number
        assert exports.stdout.read_text() == ""
        *_, line = exports.stderr.read_text().splitlines()
        left = line.removeprefix(f"error: stopped by {number.name}; ")
        assert left in ([KEPT] if attempt < 1 else [KEPT, KEPT_BEFORE, GONE] if finished(work) else [GONE])
        assert os.listdir(work) == ([PARTIAL] if finished(work) else [])
    check_continued(exports, flags, work, contents(tmp_path / "reference"))
    assert verify_export(work / "out") == []


def test_an_interrupt_of_the_console_script(flags: list[str], tmp_path: Path) -> None:
    """As a user meets it: fresh process, all imports, the engine too; and the same command once more."""
    work, flags = tmp_path / "work", [*flags, "--engine", "onnxruntime"]
    command = [str(Path(sys.executable).with_name("medusa-export")), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until((work / PARTIAL / "files/engine").exists)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert (process.returncode, out) == (143, "")
    assert err == f"error: stopped by SIGTERM; {KEPT}\n"
    assert os.listdir(work) == [PARTIAL]
    assert finished(work) >= {"onnx"}
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout == f"wrote {work / 'out'}\n"
    assert re.fullmatch(rf"continuing: [12] of 9 parts were finished\n{re.escape(ENDS)}", again.stderr)
    assert os.listdir(work) == ["out"]
    assert verify_export(work / "out") == []


def test_an_interrupt_while_tensorrt_builds(flags: list[str], tmp_path: Path) -> None:
    """TensorRT-RTX ends after the step that it is at; no engine, no half of one, and no process is left."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has wheels for Linux and Windows on x86-64 only")
    work, flags = tmp_path / "work", [*flags, "--engine", "tensorrt", "--gpu", "sm89", "--verbose"]
    command = [str(Path(sys.executable).with_name("medusa-export")), *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    seen = next(line for line in process.stderr if "Make sure output next_ids" in line)  # parsed; the build comes next
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait() == 130
    assert f"error: stopped by SIGINT; {KEPT}\n" in seen + rest
    assert os.listdir(work) == [PARTIAL]
    assert list((work / PARTIAL).rglob("*.engine")) == []
    assert finished(work) >= {"onnx"}
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "continuing: " in again.stderr
    assert os.listdir(work) == ["out"]
    assert {path.name for path in (work / "out/engine").glob("*.engine")} == {"rank0.engine", "heads.engine"}
    assert verify_export(work / "out") == []


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
    *_, line = exports.stderr.read_text().splitlines()
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
