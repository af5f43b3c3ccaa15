"""Input files: hashed once, while they are read, and the same until the end."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from medusa_export.core.artifacts import input_files as inputs_module
from medusa_export.core.artifacts.hashing import sha256
from medusa_export.core.artifacts.input_files import InputFiles
from medusa_export.core.errors import ConfigError


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{index}" for index in range(5)]
    for path in paths:
        path.write_text(f"file {path.name}")
    return paths


def expected(files: list[Path]) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_file_is_hashed_once(files: list[Path]) -> None:
    seen: list[str] = []

    def digest(path: Path, stop_point: Callable[[], None]) -> str:
        seen.append(path.name)
        return sha256(path, stop_point)

    with InputFiles([*files, files[0]], digest) as inputs:
        for path in (files[3], files[1], files[3], Path("/etc/hostname")):
            inputs.read(path)
        assert inputs.hashes() == inputs.hashes() == expected(files)
    assert sorted(seen) == ["0", "1", "2", "3", "4"]
    assert set(seen[:2]) == {"1", "3"}


def test_reading_waits_where_hashing_is_far_behind(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_module, "WORKERS", 2)
    gate, came_through = threading.Event(), threading.Event()

    def digest(path: Path, stop_point: Callable[[], None]) -> str:
        assert gate.wait(30)
        return path.name

    with InputFiles(files, digest) as inputs:
        inputs.read(files[0])
        inputs.read(files[1])  # as many as are hashed at once: no reason to wait
        reader = threading.Thread(target=lambda: (inputs.read(files[2]), came_through.set()))
        reader.start()
        assert not came_through.wait(0.1)
        gate.set()
        assert came_through.wait(30)
        reader.join()
        assert list(inputs.hashes().values()) == ["0", "1", "2", "3", "4"]


def test_marks_change_with_the_file(files: list[Path]) -> None:
    def marks() -> list[str]:
        with InputFiles(files) as inputs:
            return list(inputs.marks.values())

    before = marks()
    assert before == marks()
    assert len(set(before)) == len(files)
    times = files[0].stat()
    files[0].write_text("FILE 0")  # as long as it was, and with the times that it had
    os.utime(files[0], ns=(times.st_atime_ns, times.st_mtime_ns))
    replacement = files[1].with_name("other")
    replacement.write_bytes(files[1].read_bytes())
    replacement.replace(files[1])
    changed = [old != new for old, new in zip(before, marks(), strict=True)]
    assert changed == [True, True, False, False, False]


def test_a_file_that_changes_meanwhile(files: list[Path]) -> None:
    with InputFiles(files) as inputs:
        inputs.read(files[2])
        files[2].write_text("something else")
        with pytest.raises(ConfigError, match="2: got a file that changed while it was read"):
            inputs.hashes()


def test_what_cannot_be_read(files: list[Path]) -> None:
    with pytest.raises(ConfigError, match="absent: got no readable file"):
        InputFiles([files[0].with_name("absent")])

    def fail(path: Path, stop_point: Callable[[], None]) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    with InputFiles(files, fail) as inputs:
        inputs.read(files[0])
        with pytest.raises(ConfigError, match="Permission denied"):
            inputs.hashes()


def test_the_end_gives_hashing_up(files: list[Path]) -> None:
    begun, ended = threading.Event(), threading.Event()

    def digest(path: Path, stop_point: Callable[[], None]) -> str:
        begun.set()
        try:
            while True:
                stop_point()
        finally:
            ended.set()

    with InputFiles(files, digest) as inputs:
        inputs.read(files[0])
        assert begun.wait(30)
    assert ended.wait(30)
