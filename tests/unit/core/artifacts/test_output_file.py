"""What cannot be written is refused before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from medusa_export.core.artifacts.output_file import require_output_file
from medusa_export.core.errors import OutputError


def test_where_no_file_can_be(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="got a directory; expected a file to write"):
        require_output_file(tmp_path)
    with pytest.raises(OutputError, match="got no such directory"):
        require_output_file(tmp_path / "a" / "b.json")


def test_where_one_can_be(tmp_path: Path) -> None:
    (tmp_path / "there.json").touch()
    for path in (None, tmp_path / "new.json", tmp_path / "there.json", Path("/dev/null")):
        require_output_file(path)
