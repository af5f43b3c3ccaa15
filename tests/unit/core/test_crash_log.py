"""Where the log of a crash goes, and what stands in it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from medusa_export.core.crash_log import FOLDER, write_crash_log


def crash() -> BaseException:
    try:
        raise RuntimeError("\ud800 is no text")
    except RuntimeError as error:
        return error


def test_the_cache_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDUSA_EXPORT_CACHE", str(tmp_path))
    log = write_crash_log(crash(), ["/somewhere/medusa-run.py", "--engine", "a b"])
    assert log is not None
    assert (log.parent, log.name[:11]) == (tmp_path / FOLDER, "medusa-run-")
    text = log.read_text()
    assert "command: /somewhere/medusa-run.py --engine 'a b'" in text
    assert f"Python {'.'.join(map(str, sys.version_info[:3]))}" in text
    assert "RuntimeError: \\ud800 is no text" in text


@pytest.mark.parametrize("cache", ["off", "a file"])
def test_temporary_files_where_there_is_no_cache(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("MEDUSA_EXPORT_CACHE", cache if cache == "off" else str(tmp_path / cache))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temporary"))
    log = write_crash_log(crash(), ["medusa-run"])
    assert log is not None
    assert log.parent == tmp_path / "temporary"


def test_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("MEDUSA_EXPORT_CACHE", "off")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "a file"))
    assert write_crash_log(crash(), ["medusa-run"]) is None
