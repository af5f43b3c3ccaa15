"""--help of every command, as a file each: ``MEDUSA_EXPORT_GOLDEN=write`` rewrites them."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import tomllib
from typer.main import get_command

from medusa_export.core.flags import FlagField
from medusa_export.exporter.cli.console import main
from medusa_export.exporter.cli.data import data_app
from medusa_export.exporter.cli.doctor import doctor_app
from medusa_export.exporter.cli.export import export_app
from medusa_export.exporter.cli.run import run_app
from medusa_export.exporter.cli.serve import serve_app
from medusa_export.exporter.cli.train import train_app
from medusa_export.exporter.cli.tree import tree_app
from medusa_export.exporter.cli.triton import triton_app
from tests.paths import GOLDEN, ROOT

APPS = {
    "medusa-data": data_app, "medusa-doctor": doctor_app, "medusa-export": export_app, "medusa-run": run_app,
    "medusa-serve": serve_app, "medusa-train": train_app, "medusa-tree": tree_app, "medusa-triton": triton_app,
}  # fmt: skip
PROGRAMS = {name: get_command(app) for name, app in APPS.items()}
COMMANDS = {
    (program, *sub): found
    for program, top in PROGRAMS.items()
    for sub, found in [((), top), *(((name,), each) for name, each in getattr(top, "commands", {}).items())]
}
FLAGS: list[tuple[str, FlagField]] = [
    (" ".join(words), item) for words, found in COMMANDS.items() for item, _ in getattr(found, "flags", {}).values()
]
WIDTH = 80


def shown(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setattr(sys, "argv", [*words, "--help"])
    with pytest.raises(SystemExit) as stopped:
        main(APPS[words[0]])
    assert not stopped.value.code
    return "".join(f"{line.rstrip()}\n" for line in capfd.readouterr().out.splitlines())


def test_every_program_is_here() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(project["scripts"]) == set(APPS)
    assert {path.stem for path in (GOLDEN / "help").iterdir()} == {"-".join(words) for words in COMMANDS}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_golden(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    text, file = shown(words, monkeypatch, capfd), Path(GOLDEN / "help" / f"{'-'.join(words)}.txt")
    assert max(map(len, text.splitlines())) <= WIDTH
    if os.environ.get("MEDUSA_EXPORT_GOLDEN") == "write":
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_examples_take_flags_that_exist(words: tuple[str, ...]) -> None:
    text = COMMANDS[words].help or ""
    examples = re.findall(r"Example: (medusa-\S+(?: [a-z]+)?)(.*)", text)
    assert examples or words == ("medusa-tree",)
    for _, rest in examples:
        for option in re.findall(r"--[\w-]+", rest):
            assert option in {each for param in COMMANDS[words].params for each in param.opts}


@pytest.mark.parametrize(("command", "item"), FLAGS, ids=lambda value: getattr(value, "name", value))
def test_a_flag_is_well_said(command: str, item: FlagField) -> None:
    """A sentence that begins with a capital (or a file's name) and ends with a full stop, no default in it, under a heading."""
    said = item.flag
    assert said.help.endswith("."), said.help
    assert not said.help[0].islower() or ".json" in said.help.split()[0], said.help
    assert "efault:" not in said.help
    assert said.panel or item.name == "--verbose"
    if said.choices and isinstance(item.value, str):
        assert item.value in said.choices
