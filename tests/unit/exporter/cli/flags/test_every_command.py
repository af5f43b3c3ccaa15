"""--config, --print-config, --version and shell completion, of every command that there is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml

from medusa_export.core.flags import Bounds, FlagField
from medusa_export.exporter.cli.console import main
from medusa_export.heads.trees.tree import PRESETS
from tests.unit.exporter.cli.flags.test_help_page import APPS, COMMANDS

Start = Callable[..., tuple[int, str, str]]
SAMPLES: dict[Any, Any] = {int: 3, str: "text", Path: "a/path"}
WITH_FLAGS = {words: found for words, found in COMMANDS.items() if words != ("medusa-tree",)}
CHOICES = [
    (words, item) for words, found in WITH_FLAGS.items() for item, _ in getattr(found, "flags", {}).values() if item.flag.choices
]  # fmt: skip


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Start:
    def call(words: tuple[str, ...], *flags: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [*words, *map(str, flags)])
        with pytest.raises(SystemExit) as stopped:
            main(APPS[words[0]])
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


def sample(item: FlagField, kind: Any) -> Any:
    """A value that a flag takes."""
    if get_origin(kind) is tuple:
        return [sample(item, get_args(kind)[0])] * 2
    kinds = [kind, *get_args(kind)]
    if bool in kinds:
        return not item.value
    if item.flag.choices:
        return list(item.flag.choices)[-1]
    if float in kinds:
        return next(value for value in (1.0, 0.5) if item.flag.bounds.hold(value))
    return next(SAMPLES[each] for each in kinds if each in SAMPLES)


@pytest.mark.parametrize("words", WITH_FLAGS, ids=" ".join)
def test_a_file_of_all_flags_comes_back(words: tuple[str, ...], start: Start, tmp_path: Path) -> None:
    """And nothing is run."""
    fields = [pair for pair in WITH_FLAGS[words].flags.values() if not pair[0].flag.positional]
    written = {item.name.lstrip("-"): sample(item, kind) for item, kind in fields}
    positional = [item for item, _ in WITH_FLAGS[words].flags.values() if item.flag.positional]
    (tmp_path / "flags.yaml").write_text(yaml.safe_dump(written))
    given = ["somewhere" for _ in positional]
    code, out, err = start(words, *given, "--config", tmp_path / "flags.yaml", "--print-config")
    assert (code, err) == (0, "")
    expected = written | dict.fromkeys((item.field for item in positional), "somewhere")
    assert yaml.safe_load(out or "{}") == expected
    (tmp_path / "again.yaml").write_text(out)
    assert start(words, *given, "--config", tmp_path / "again.yaml", "--print-config") == (0, out, "")


NUMBERS = [
    (words, item, float in [kind, *get_args(kind)])
    for words, found in WITH_FLAGS.items()
    for item, kind in getattr(found, "flags", {}).values()
    if {int, float} & {kind, *get_args(kind)}
]


@pytest.mark.parametrize(("words", "item", "takes_nan"), NUMBERS, ids=lambda value: getattr(value, "name", None))
def test_numbers_out_of_bounds(words: tuple[str, ...], item: FlagField, takes_nan: bool, start: Start) -> None:
    """Of every command, and before anything is opened: one line that names the flag."""
    given = ["somewhere" for other, _ in WITH_FLAGS[words].flags.values() if other.flag.positional]
    bounds = item.flag.bounds
    assert bounds != Bounds() or item.name.endswith("port"), "say which numbers it takes"
    for value in ["nan"] * takes_nan + [str(-(10**9))] * (bounds != Bounds()):
        code, _, err = start(words, *given, f"{item.name}={value}")
        assert (code, err.count("\n")) == (2, 1)
        assert err.startswith(f"error: {item.name}: got {float(value) if takes_nan else value}; expected ")


@pytest.mark.parametrize("program", APPS)
def test_version(program: str, start: Start) -> None:
    code, out, err = start((program,), "--version")
    assert (code, out[:14], err) == (0, "medusa-export ", "")


@pytest.mark.parametrize(("words", "item"), CHOICES, ids=lambda value: getattr(value, "name", None) or " ".join(value))
def test_choices_are_completed(words: tuple[str, ...], item: FlagField, start: Start, monkeypatch: Any) -> None:
    monkeypatch.setenv(f"_{words[0].upper().replace('-', '_')}_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join([*words, item.name, ""]))
    monkeypatch.setenv("COMP_CWORD", str(len(words) + 1))
    assert start((words[0],))[1].split() == list(item.flag.choices)


def test_presets_are_completed_and_paths_beside_them(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_MEDUSA_EXPORT_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_CWORD", "2")
    monkeypatch.setenv("COMP_WORDS", "medusa-export --tree cpu")
    assert start(("medusa-export",))[1].split() == [name for name in PRESETS if name.startswith("cpu")] != []
    monkeypatch.setenv("COMP_WORDS", "medusa-export --tree ./cpu")
    assert start(("medusa-export",))[1].split() == []


def test_a_program_of_sub_commands_alone_prints_its_help(start: Start) -> None:
    code, out, err = start(("medusa-tree",))
    assert (code, err) == (2, "")
    assert out.rstrip() == start(("medusa-tree",), "--help")[1].rstrip()


@pytest.mark.parametrize(("shell", "answer"), [("zsh", "_files"), ("bash", "")])
def test_paths_are_left_to_the_shell(shell: str, answer: str, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """zsh is told so; bash completes files by itself where nothing is answered."""
    monkeypatch.setenv("_MEDUSA_EXPORT_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "medusa-export --ckpt /t")
    monkeypatch.setenv("COMP_WORDS", "medusa-export --ckpt /t")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert start(("medusa-export",))[1].strip() == answer
    monkeypatch.setenv("_MEDUSA_EXPORT_COMPLETE", "source_bash")
    assert "complete -o default" in start(("medusa-export",))[1]
