"""found_instead: a file is a file, through links too; everything else has a name."""

from __future__ import annotations

import os
from pathlib import Path

from medusa_export.core.regular_files import ABSENT, found_instead


def test_files_and_links_to_files(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "link2").symlink_to(tmp_path / "link")
    assert [found_instead(tmp_path / name) for name in ("file", "link", "link2")] == [None] * 3


def test_everything_else(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    kinds = {
        tmp_path: "a directory",
        tmp_path / "absent": ABSENT,
        tmp_path / "fifo": "a FIFO",
        tmp_path / "dangling": "a link to nothing",
        tmp_path / "loop": "a path that cannot be read (Too many levels of symbolic links)",
        tmp_path / "file/below": "a path that cannot be read (Not a directory)",
        tmp_path / ("x" * 300): "a path that cannot be read (File name too long)",
        tmp_path / "a\0b": "a path that cannot be read (embedded null byte)",
        Path("/dev/null"): "a device",
    }
    assert {path: found_instead(path) for path in kinds} == kinds
