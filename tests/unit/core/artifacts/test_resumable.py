"""Parts of an output: made once, kept through kills and interrupts, made again when they are not what they were."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.artifacts import manifest
from medusa_export.core.artifacts.manifest import output_directory, read_manifest, verify_manifest
from medusa_export.core.artifacts.resumable import ResumableOutput
from medusa_export.core.artifacts.staging import KEPT
from medusa_export.core.errors import MissingPackageError, OutputError

RUN: dict[str, Any] = {"inputs": {"model": "ab"}, "arguments": {"tp": 2, "quant": "fp8"}}
FILES = {"one": "hello", "deep/two": "{}", "many": "directory"}

# Finishes the parts named, starts one more, and waits to be killed.
KILLED = """
import sys, time
from pathlib import Path
from medusa_export.core.artifacts.manifest import output_directory

def hang(path):
    path.write_text("half")
    print("half", flush=True)
    time.sleep(60)

with output_directory(Path(sys.argv[1]), inputs={"model": "ab"}, arguments={"tp": 2, "quant": "fp8"}) as work:
    (work.path / "plain").write_text("not a part")
    work.record("note", {"from": "the first run"})
    for name in sys.argv[2:]:
        work.run_once(name, lambda path: path.write_text(name))
    work.run_once("unfinished", hang)
"""


class Interrupted(BaseException):
    """Stands in for what ends a body."""


def fill(work: ResumableOutput) -> list[str]:
    """Make three parts; returns those that had to be made."""
    made = []
    for name, text in FILES.items():

        def make(path: Path, name: str = name, text: str = text) -> None:
            made.append(name)
            if text == "directory":
                (path / "sub").mkdir(parents=True)
                (path / "sub/x").write_text("x")
                (path / "y").write_text("y")
            else:
                path.write_text(text)

        assert work.run_once(name, make) == (made[-1:] == [name])
    return made


def write(out: Path, body: Callable[[ResumableOutput], Any]) -> None:
    """A run with another body."""
    with output_directory(out, **RUN) as work:
        body(work)


def start(out: Path, error: BaseException = Interrupted()) -> Path:  # noqa: B008
    """A run that is interrupted after its last part; returns its working directory."""
    with suppress(type(error)), output_directory(out, **RUN) as work:
        assert fill(work) == [*FILES]
        raise error
    return out.parent / f".{out.name}.partial"


def finish(out: Path, **changes: Any) -> list[str]:
    """The next run; returns what it made."""
    with output_directory(out, **(RUN | changes)) as work:
        made = fill(work)
    assert verify_manifest(out) == []
    assert os.listdir(out.parent) == [out.name]
    return made


def test_one_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with output_directory(out, **RUN) as work:
        assert fill(work) == [*FILES]
        assert fill(work) == []
        (work.path / "plain").write_text("p")
        assert work.resumed == {}
    assert list(read_manifest(out)["files"]) == ["deep/two", "many/sub/x", "many/y", "one", "plain"]
    assert verify_manifest(out) == []
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [Interrupted(), KeyboardInterrupt(), SystemExit(143), ValueError("a bug")])
def test_an_interrupt_keeps_finished_parts(tmp_path: Path, error: BaseException) -> None:
    partial = start(tmp_path / "out", error)
    assert os.listdir(tmp_path) == [partial.name]
    assert error.__notes__ == [KEPT]
    inodes = {path: path.stat().st_ino for path in partial.rglob("*")}
    assert len(inodes) == 9
    with suppress(Interrupted), output_directory(tmp_path / "out", **RUN) as work:
        assert work.resumed == {"one": 5, "deep/two": 2, "many": 2}
        assert fill(work) == []
        raise Interrupted
    assert {path: path.stat().st_ino for path in partial.rglob("*")} == inodes
    assert finish(tmp_path / "out") == []


def test_the_result_is_that_of_an_uninterrupted_run(tmp_path: Path) -> None:
    for name in ("whole", "out"):
        (tmp_path / name).mkdir()
    start(tmp_path / "out/out")
    assert finish(tmp_path / "out/out") == []
    assert finish(tmp_path / "whole/out") == [*FILES]
    one, other = (read_manifest(tmp_path / name / "out") for name in ("whole", "out"))
    assert {**one, "created": ""} == {**other, "created": ""}
    assert list(one) == list(other)


def refused(work: ResumableOutput) -> None:
    fill(work)
    raise OutputError("out", "a bad checkpoint", "a good one", "report this")


def full(work: ResumableOutput) -> None:
    fill(work)
    raise OSError(errno.ENOSPC, "No space left on device")


def full_in_a_library(work: ResumableOutput) -> None:
    fill(work)
    raise RuntimeError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("fail", [refused, full, full_in_a_library])
def test_a_refusal_keeps_nothing(tmp_path: Path, fail: Callable[[ResumableOutput], None]) -> None:
    with pytest.raises(OutputError) as raised:
        write(tmp_path / "out", fail)
    assert os.listdir(tmp_path) == []
    assert not hasattr(raised.value, "__notes__")


def interrupted_import(work: ResumableOutput) -> None:
    fill(work)
    try:
        try:
            raise SystemExit(143)
        except SystemExit as error:
            raise ImportError("while importing") from error
    except ImportError as error:
        raise MissingPackageError("onnx", "not installed", "it", "install it") from error


def test_an_interrupt_that_a_library_disguises(tmp_path: Path) -> None:
    with pytest.raises(MissingPackageError) as raised:
        write(tmp_path / "out", interrupted_import)
    assert raised.value.__notes__ == [KEPT]
    assert finish(tmp_path / "out") == []


def kill(out: Path, *parts: str) -> Path:
    """kill -9 with the parts finished, and another one begun."""
    writer = subprocess.Popen([sys.executable, "-c", KILLED, str(out), *parts], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "half\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    return out.parent / f".{out.name}.partial"


def test_kill_9(tmp_path: Path) -> None:
    partial = kill(tmp_path / "out", "one", "deep/two")
    assert (partial / "files/unfinished").read_text() == "half"
    made = []
    with output_directory(tmp_path / "out", **RUN) as work:
        assert sorted(path.name for path in work.path.rglob("*")) == ["deep", "one", "two"]  # and nothing unfinished
        assert work.resumed == {"one": 3, "deep/two": 8}
        for name in ("one", "deep/two", "unfinished"):
            if work.run_once(name, lambda path: path.write_text("whole")):
                made.append(name)
    assert made == ["unfinished"]
    assert (tmp_path / "out/deep/two").read_text() == "deep/two"
    assert read_manifest(tmp_path / "out")["note"] == {"from": "the first run"}
    assert verify_manifest(tmp_path / "out") == []


def test_kill_9_before_any_part_is_finished(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kill(tmp_path / "out")
    assert finish(tmp_path / "out") == [*FILES]
    assert caplog.records == []


def test_parts_that_are_no_longer_asked_for_are_no_part_of_the_output(tmp_path: Path) -> None:
    kill(tmp_path / "out", "one", "two")
    with output_directory(tmp_path / "out", **RUN) as work:
        work.run_once("one", lambda path: None)
    assert sorted(os.listdir(tmp_path / "out")) == ["medusa.json", "one"]
    assert verify_manifest(tmp_path / "out") == []


def flip(files: Path) -> None:
    (files / "one").write_text("hellO")


def shorten(files: Path) -> None:
    (files / "one").write_text("hell")


def link(files: Path) -> None:
    (files / "one").rename(files.parent / "elsewhere")
    (files / "one").symlink_to(files.parent / "elsewhere")


def directory_in_its_place(files: Path) -> None:
    (files / "one").unlink()
    (files / "one").mkdir()


@pytest.mark.parametrize(
    ("damage", "again"),
    [
        (flip, "one"),
        (shorten, "one"),
        (link, "one"),
        (directory_in_its_place, "one"),
        (lambda files: (files / "deep/two").unlink(), "deep/two"),
        (lambda files: (files / "many/sub/x").write_text("X"), "many"),
        (lambda files: (files / "many/y").unlink(), "many"),
    ],
)
def test_a_part_that_changed_is_made_again(
    tmp_path: Path, damage: Callable[[Path], Any], again: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(start(tmp_path / "out") / "files")
    assert finish(tmp_path / "out") == [again]
    assert [record.getMessage() for record in caplog.records] == [f"{again}: changed since it was finished; made again"]


def test_surplus_files_are_removed(tmp_path: Path) -> None:
    files = start(tmp_path / "out") / "files"
    (files / "many/z").write_text("z")
    (files / "empty").mkdir()
    (files / "medusa.json").write_text("{}")  # killed just before it was published
    (files / "link").symlink_to("/etc")
    assert finish(tmp_path / "out") == []
    assert sorted(os.listdir(tmp_path / "out")) == ["deep", "many", "medusa.json", "one"]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"arguments": {"tp": 4, "quant": "fp8"}}, "arguments (tp)"),
        ({"arguments": {"tp": 2}}, "arguments (quant)"),
        ({"inputs": {"model": "cd"}}, "inputs (model)"),
    ],
)
def test_another_run_discards(
    tmp_path: Path, changes: dict[str, Any], what: str, caplog: pytest.LogCaptureFixture
) -> None:
    partial = start(tmp_path / "out")
    assert finish(tmp_path / "out", **changes) == [*FILES]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == f"{partial}: left by an interrupted run with other {what}; discarded"


def test_another_version_discards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start(tmp_path / "out")
    versions = manifest.package_versions()
    monkeypatch.setattr(manifest, "package_versions", lambda: {**versions, "torch": "9.9"})
    assert finish(tmp_path / "out") == [*FILES]
    assert "other versions (torch)" in caplog.text


@pytest.mark.parametrize(
    "tail", [b"0123", b'12345678 {"part": "three", "fi', b'00000000 {"part": "one"}\n', b"\0" * 600]
)
def test_a_torn_line_at_the_end_of_the_journal(tmp_path: Path, tail: bytes) -> None:
    journal = start(tmp_path / "out") / "journal.jsonl"
    with journal.open("ab") as file:
        file.write(tail)
    with suppress(Interrupted), output_directory(tmp_path / "out", **RUN) as work:
        assert fill(work) == []
        work.run_once("more", lambda path: path.write_text("m"))  # lines go after the last whole one
        raise Interrupted
    with output_directory(tmp_path / "out", **RUN) as work:
        assert work.resumed.keys() == {*FILES, "more"}
        assert fill(work) == []


def test_every_cut_of_the_journal_is_survived(tmp_path: Path) -> None:
    """Wherever a kill or a power loss ends it: whole lines count, and the output is the same."""
    journal = start(tmp_path / "out") / "journal.jsonl"
    data = journal.read_bytes()
    ends = [index + 1 for index, byte in enumerate(data) if byte == ord("\n")]
    assert len(ends) == 1 + len(FILES)
    for size in sorted({0, 1, *ends, *(end - 1 for end in ends), *(end + 20 for end in ends[:-1])}):
        partial = start(tmp_path / f"cut{size}")
        (partial / "journal.jsonl").write_bytes(data[:size])
        whole = max(0, sum(end <= size for end in ends) - 1)
        with output_directory(tmp_path / f"cut{size}", **RUN) as work:
            assert fill(work) == [*FILES][whole:], size
        assert verify_manifest(tmp_path / f"cut{size}") == []


def test_a_flipped_byte_in_the_journal_never_counts(tmp_path: Path) -> None:
    data = (start(tmp_path / "out") / "journal.jsonl").read_bytes()
    for index in range(5, len(data), 37):
        partial = start(tmp_path / f"flip{index}")
        (partial / "journal.jsonl").write_bytes(data[:index] + bytes([data[index] ^ 4]) + data[index + 1 :])
        line = data[:index].count(b"\n")
        with output_directory(tmp_path / f"flip{index}", **RUN) as work:
            assert fill(work) == [*FILES][max(0, line - 1) :], index


def test_a_failed_part_is_not_finished(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise ValueError

    def first(work: ResumableOutput) -> None:
        work.run_once("one", lambda path: path.write_text("1"))
        work.run_once("two", fail)

    with pytest.raises(ValueError):
        write(tmp_path / "out", first)
    with output_directory(tmp_path / "out", **RUN) as work:
        assert not work.run_once("one", fail)
        assert work.run_once("two", lambda path: path.write_text("2"))
    assert (tmp_path / "out/two").read_text() == "2"


def test_a_part_is_recorded_after_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def spy(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    with output_directory(tmp_path / "out", **RUN) as work:
        monkeypatch.setattr(os, "fsync", spy)
        work.run_once("deep/two", lambda path: path.write_text("2"))
        assert synced == ["two", "deep", "files", "journal.jsonl"]
        synced.clear()
        work.record("key", 1)
        assert synced == ["journal.jsonl"]


def test_threads(tmp_path: Path) -> None:
    """All make their parts at once, and every one is recorded."""
    names, meeting = [f"dir/{index}" for index in range(8)], threading.Barrier(8, timeout=30)

    def make(path: Path) -> None:
        meeting.wait()
        path.write_text(path.name)

    with suppress(Interrupted), output_directory(tmp_path / "out", **RUN) as work:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(lambda name: work.run_once(name, make), names))
        raise Interrupted
    with output_directory(tmp_path / "out", **RUN) as work, ThreadPoolExecutor(8) as pool:
        assert work.resumed.keys() == set(names)
        assert not any(pool.map(lambda name: work.run_once(name, make), names))
    assert verify_manifest(tmp_path / "out") == []


def test_recorded_values(tmp_path: Path) -> None:
    with output_directory(tmp_path / "out", **RUN) as work:
        work.record("scales", {"count": 3, "max": 1.5})
        work.record("scales", {"count": 4, "max": 1.5})
        work.record("error", [None, "x"])
    body = json.loads((tmp_path / "out/medusa.json").read_text())
    assert (body["scales"], body["error"]) == ({"count": 4, "max": 1.5}, [None, "x"])
    assert list(body)[-1] == "files"
    with pytest.raises(ValueError, match="inputs"), output_directory(tmp_path / "other", **RUN) as work:
        work.record("inputs", {})
    with pytest.raises(TypeError), output_directory(tmp_path / "third", **RUN) as work:
        work.record("key", object())


def test_a_link_in_a_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="one: got a link"), output_directory(tmp_path / "out", **RUN) as work:
        work.run_once("one", lambda path: path.symlink_to("/etc/hostname"))
    assert os.listdir(tmp_path) == []
