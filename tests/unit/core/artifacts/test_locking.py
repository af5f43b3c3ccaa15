"""The lock of a working directory, when its holder removes the directory while others wait at the door."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from medusa_export.core.artifacts import locking
from medusa_export.core.artifacts.locking import make_locked, require_idle
from medusa_export.core.errors import OutputError


@pytest.mark.parametrize("again", [False, True])
def test_a_directory_that_is_removed_meanwhile(again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock on what no longer has the name would keep nobody out."""
    path, opened = tmp_path / "partial", []
    real = locking.open_directory

    def open_and_remove(directory: Path) -> int | None:
        opened.append(real(directory))
        if len(opened) == 1:
            directory.rmdir()
            if again:  # by the next process
                (tmp_path / "new").mkdir()
                (tmp_path / "new").rename(directory)
        return opened[-1]

    monkeypatch.setattr(locking, "open_directory", open_and_remove)
    descriptor = make_locked(path, tmp_path / "out")
    assert len(opened) == 2
    assert os.path.samestat(os.fstat(descriptor), path.stat())
    monkeypatch.undo()
    with pytest.raises(OutputError, match="out: got another process"):
        require_idle(path, tmp_path / "out")
    os.close(descriptor)
    require_idle(path, tmp_path / "out")


def test_a_directory_that_is_removed_before_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tries = tmp_path / "partial", []
    real = locking.open_directory

    def remove_and_open(directory: Path) -> int | None:
        tries.append(directory)
        if len(tries) == 1:
            directory.rmdir()
        return real(directory)

    monkeypatch.setattr(locking, "open_directory", remove_and_open)
    os.close(make_locked(path, tmp_path / "out"))
    assert len(tries) == 2


def test_descriptors_are_closed(tmp_path: Path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    held = make_locked(tmp_path / "partial", tmp_path / "out")
    for attempt in (make_locked, require_idle):
        with pytest.raises(OutputError):
            attempt(tmp_path / "partial", tmp_path / "out")
    assert count() == before + 1
    os.close(held)
