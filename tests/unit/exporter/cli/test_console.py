"""What a full disk is called: standard output, or the file."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import pytest

from medusa_export.core.artifacts.output_file import write_output
from medusa_export.exporter.cli.console import command_app, main, stdout

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


def _to_a_file() -> None:
    write_output(FULL, "x")


def _to_a_file_without_the_helper() -> None:
    FULL.write_text("x")


def _to_stdout() -> None:
    stdout.print("x")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (_to_a_file, "/dev/full: got no space left on the disk;"),
        (_to_a_file_without_the_helper, "a temporary file"),
        (_to_stdout, "standard output: No space left on device"),
    ],
)
def test_a_full_disk_is_named(
    body: object, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("medusa_export.exporter.cli.console.give_up_stdout", lambda: None)
    monkeypatch.setattr(sys, "argv", ["program"])
    app = command_app()
    app.command()(body)  # type: ignore[arg-type]
    with FULL.open("w") as full:
        if body is _to_stdout:
            monkeypatch.setattr("sys.stdout", full)
        with pytest.raises(SystemExit) as raised:
            main(app)
        with suppress(OSError):
            full.close()
    error = capsys.readouterr().err
    assert (raised.value.code, error.startswith(f"error: {said}"), error.count("\n")) == (2, True, 1)
