"""output_file: whole under its name or not there; what cannot be written is named."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from medusa_export.core.artifacts.output_file import output_file, require_output_file, write_output
from medusa_export.core.errors import OutputError


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a disk that is full after so many bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    for before in (None, "as it was"):
        if before:
            path.write_text(before)
        with pytest.raises(OutputError, match="allows; expected room") as raised, files_of_at_most(100):
            write_output(path, "x" * 5000)
        assert raised.value.where == str(path)
        assert [found.read_text() for found in tmp_path.iterdir()] == ([before] if before else [])


def test_a_device_is_written_and_named(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(OutputError, match=r"^/dev/full: got no space left on the disk;"):
        write_output(full, "x")
    write_output(Path("/dev/null"), "x")
    assert Path("/dev/null").is_char_device()


def test_a_link_stays_one_and_the_mode_stays(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.touch(mode=0o600)
    link.symlink_to("real.json")
    with output_file(link) as scratch:
        assert scratch.suffix == ".json", "matplotlib chooses the format by it"
        scratch.write_text("é", encoding="utf-8")
        assert real.read_text() == ""
    assert link.is_symlink()
    assert (real.read_bytes(), real.stat().st_mode & 0o777) == ("é".encode(), 0o600)


def test_where_no_file_can_be(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="got a directory; expected a file to write"):
        require_output_file(tmp_path)
    with pytest.raises(OutputError, match="got a directory; expected a file to write"):
        write_output(tmp_path, "x")
    with pytest.raises(OutputError, match="got no such directory"):
        require_output_file(tmp_path / "a" / "b.json")


def test_where_one_can_be(tmp_path: Path) -> None:
    (tmp_path / "there.json").touch()
    for path in (None, tmp_path / "new.json", tmp_path / "there.json", Path("/dev/null")):
        require_output_file(path)
