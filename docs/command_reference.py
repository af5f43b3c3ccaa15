"""Writes docs/commands.md from the flags themselves: ``python docs/command_reference.py``. A test says when it is out of date."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomllib
from typer.main import get_command

from medusa_export.exporter.cli.flags.help_page import flag_head, flag_text

DOCS = Path(__file__).resolve().parent
HEAD = """# Commands

Every command, with every flag. `--help` says the same; this page is written from the same table by `docs/command_reference.py`.

All commands take `--help` (`-h`). All but `medusa-tree` itself, which only has sub-commands, take these, too:

- `--config FILE.yaml`: read flags from this file, such as `max-length: 512`. The command line wins.
- `--print-config`: print the given flags as YAML for `--config`, and exit.
- `--verbose` (`-v`): log what happens, and show tracebacks.

Programs, but not their sub-commands, take `--version`, and `--install-completion` for your shell: choices and paths are completed.

Exit codes:

| code | what |
| --- | --- |
| 0 | done |
| 1 | it found something wrong, or missed a required threshold; it says what |
| 2 | it cannot do what was asked; one line says why and what to do |
| 3 | it crashed, a fault of this program; one line names the log, which has versions and the traceback |
| 130, 143 | it was stopped, by Ctrl-C or SIGTERM |
"""
GENERAL = "verbose"  # a flag of every command


def page() -> str:
    """The page."""
    scripts = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    return HEAD + "".join("\n" + line for name in sorted(scripts) for line in _program(name, scripts[name])) + "\n"


def _program(name: str, entry: str) -> Iterator[str]:
    """A program and its sub-commands; the app stands beside the function that the script calls."""
    module, function = entry.split(":")
    top = get_command(getattr(importlib.import_module(module), function.replace("_main", "_app")))
    yield from _command(name, top, level=2)
    for sub, command in getattr(top, "commands", {}).items():
        yield from _command(f"{name} {sub}", command, level=3)


def _command(words: str, command: Any, level: int) -> Iterator[str]:
    yield f"{'#' * level} {words}\n"
    for paragraph in inspect.cleandoc(command.help).split("\n\n"):
        text = " ".join(paragraph.split())
        example = text.removeprefix("Example: ")
        yield f"    {example}\n" if example != text else f"{text}\n"
    flags = {key: pair for key, pair in getattr(command, "flags", {}).items() if key != GENERAL}
    for panel in dict.fromkeys(item.flag.panel for item, _ in flags.values()):
        yield f"**{panel}**\n"
        for item, kind in flags.values():
            if item.flag.panel == panel:
                yield f"- `{flag_head(item, kind)}`: {_plain(flag_text(item))}"
                yield from (f"    - `{name}`: {_plain(text)}" for name, text in item.flag.choices.items() if text)
        yield ""


def _plain(text: str) -> str:
    """Text whose marks Markdown would take for its own."""
    return text.replace("*", r"\*").replace("<", "&lt;")


if __name__ == "__main__":
    (DOCS / "commands.md").write_text(page(), encoding="utf-8")
