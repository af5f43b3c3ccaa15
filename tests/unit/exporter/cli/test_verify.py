"""medusa-export verify on what other tools wrote: notes are said, and are no errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from medusa_export.core.errors import OutputError
from medusa_export.exporter.cli.verify import verify_directory


def test_notes_are_said(make_case: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = make_case().write(tmp_path / "theirs")
    config = json.loads((out / "config.json").read_text())
    for key in ("head_size", "mlp_bias"):
        del config[key]
    (out / "config.json").write_text(json.dumps(config))
    verify_directory(out, ckpt=None, heads=None, require_source=False, quick=True)
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if line.startswith("note:")] == [
        "note: config.json: no head_size; TensorRT-LLM takes 16",
        "note: config.json: no mlp_bias; TensorRT-LLM takes False",
    ]
    assert said[-1].endswith(": complete and consistent")


def test_what_is_no_export_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for name, got in (("", "a directory without either"), ("nope", "no such file or directory"), ("file", "a file")):
        with pytest.raises(OutputError, match=f"got {got}; expected an export") as raised:
            verify_directory(tmp_path / name, ckpt=None, heads=None, require_source=False, quick=True)
        assert raised.value.where == str(tmp_path / name)
    assert capsys.readouterr().out == ""


def test_an_export_that_lost_its_manifest_is_found_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trtllm").mkdir()
    with pytest.raises(typer.Exit) as raised:
        verify_directory(tmp_path, ckpt=None, heads=None, require_source=False, quick=True)
    assert raised.value.exit_code == 1
    assert "medusa.json: got no such file" in capsys.readouterr().out
