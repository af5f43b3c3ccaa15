"""Where a command finds its engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from medusa_export.heads.contract.engine_info import ENGINE_FILE, find_engine


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([ENGINE_FILE], "."),
        ([f"engine/{ENGINE_FILE}"], "engine"),
        ([ENGINE_FILE, f"engine/{ENGINE_FILE}"], "."),
        (["engine/other.json"], "."),
        ([], "."),
    ],
    ids=["an engine", "an export", "an engine that has another", "no engine in it", "nothing"],
)
def test_an_engine_or_its_export(files: list[str], expected: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert find_engine(tmp_path) == tmp_path / expected


def test_an_absent_directory_is_what_the_error_will_name(tmp_path: Path) -> None:
    assert find_engine(tmp_path / "absent") == tmp_path / "absent"
