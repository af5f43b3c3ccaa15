"""A command that is built from dataclasses: values, defaults, choices, files of flags, and what is refused in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from medusa_export.core.errors import TreeError
from medusa_export.core.flags import flag
from medusa_export.exporter.cli.console import command_app, main
from medusa_export.exporter.cli.flags.commands import Common, Given, callback, command, require


def _twice(given: Any) -> int:
    return 2 * int(given["size"])


@dataclass(frozen=True)
class Input:
    model: Path = flag(help="Directory of the model. It is read.")
    double: int = flag(help="Twice.", derive=_twice, default="twice --size")
    size: int = flag(4, help="Size.", aliases=("-s",))
    form: str = flag("none", help="Format.", choices={"none": "16 bit", "fp8": "8 bit"})
    names: tuple[str, ...] = flag((), help="Names.", name="--name")
    fast: bool = flag(False, help="Fast.")
    exact: bool = flag(True, help="Exact.", opposite="--no-exact")
    gpu: str | None = flag(None, help="GPU.", requires="--fast")


@dataclass(frozen=True)
class Cheap:
    rate: float = flag(0.5, help="Rate.")
    rows: int = flag(8, help="Rows.", name="--batch-rows", requires="no --fast")


@dataclass(frozen=True)
class Dear:
    learning_rate: float = flag(0.1, help="Rate.", name="--rate")
    base: str = "frozen"


Calls = list[tuple[Any, ...]]


@pytest.fixture
def calls() -> Calls:
    return []


@pytest.fixture
def run(calls: Calls, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """``run(*flags)``: exit code, stdout and stderr of a program with a command of its own and a sub-command."""
    app = command_app()

    @callback(app, either=(Cheap, Dear))
    def whole(own: Input, given: Given, common: Common) -> None:
        """Do it."""
        given.require((Cheap, Dear), {"no --fast": not own.fast})
        require(own, {"--fast": own.fast})
        calls.append((own, given.build(Dear if own.fast else Cheap), common.verbose))

    @command(app, "part")
    def part(own: Cheap) -> None:
        """Do a part of it."""
        if own.rows > 8:
            raise TreeError("rows", f"{own.rows}", "at most 8", "correct it")
        if own.rate > 8:
            raise TreeError("rate", f"{own.rate:g}", "at most 8", "correct it")
        calls.append((own,))

    def start(*flags: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medusa-try", *map(str, flags)])
        with pytest.raises(SystemExit) as stopped:
            main(app)
        captured = capfd.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return start


def test_defaults_are_the_fields(run: Callable[..., Any], calls: Calls) -> None:
    assert run("--model", "m") == (0, "", "")
    assert calls == [(Input(Path("m"), double=8), Cheap(), False)]


def test_every_kind_of_value(run: Callable[..., Any], calls: Calls) -> None:
    flags = [
        "--model",
        "m",
        "-s",
        3,
        "--form",
        "fp8",
        "--name",
        "a",
        "--name",
        "b",
        "--fast",
        "--no-exact",
        "--gpu",
        "x",
    ]
    assert run(*flags, "--double", 1, "--rate", 0.25, "-v") == (0, "", "")
    own = Input(Path("m"), 1, 3, "fp8", ("a", "b"), True, False, "x")
    assert calls == [(own, Dear(0.25), True)]


def test_a_sub_command_does_not_run_what_stands_above_it(run: Callable[..., Any], calls: Calls) -> None:
    assert run("part", "--rate", 2) == (0, "", "")
    assert calls == [(Cheap(2.0),)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--model: got nothing; expected a value (Directory of the model); see medusa-try --help"),
        (["--model", "m", "--form", "fp9"], "--form: got 'fp9'; expected one of none, fp8; did you mean fp8?"),
        (["--model", "m", "--form", "int"], "--form: got 'int'; expected one of none, fp8; choose one of them"),
        (["--model", "m", "--gpu", "x"], "--gpu: got x; expected none: --gpu requires --fast; leave --gpu out"),
        (["--model", "m", "--fast", "--batch-rows", 2], "--batch-rows: got 2; expected none: --batch-rows requires no --fast;"),
        (["--model", "m", "--config", "absent.yaml"], "absent.yaml: got no such file; expected a YAML file with flags"),
        (["--model", "m", "--size", "two"], "--size: got 'two'; expected an integer; correct it"),
        (["--model", "m", "-s", "1.5"], "--size: got '1.5'; expected an integer; correct it"),
        (["--model", "m", "--rate", "x"], "--rate: got 'x'; expected a number; correct it"),
        (["--modell", "m"], "--modell: got an unknown flag; expected flags of medusa-try; did you mean --model?"),
        (["-z"], "-z: got an unknown flag; expected flags of medusa-try; see medusa-try --help"),
        (["--model"], "--model: got no value; expected one; see medusa-try --help"),
        (["--fast=1"], "--fast: got a value; expected none; see medusa-try --help"),
        (["patr"], "patr: got an unknown command; expected one of part; did you mean part?"),
        (["part", "x"], "medusa-try part: got unexpected extra argument"),
        (["part", "--rte", 2], "--rte: got an unknown flag; expected flags of medusa-try part; did you mean --rate?"),
        (["part", "--rate", 9], "--rate: got 9; expected at most 8"),
        (["part", "--batch-rows", 9], "--batch-rows: got 9; expected at most 8"),
    ],
)  # fmt: skip
def test_refused_in_one_line(flags: list[object], message: str, run: Callable[..., Any], calls: Calls) -> None:
    code, out, err = run(*flags)
    assert (code, out, calls) == (2, "", [])
    (line,) = err.splitlines()
    assert line.startswith(f"error: {message}")


def test_a_file_of_flags(run: Callable[..., Any], calls: Calls, tmp_path: Path) -> None:
    """Keys are flags with or without dashes, an opposite among them; lists repeat; the command line wins."""
    file = tmp_path / "flags.yaml"
    file.write_text("model: m\nsize: 3\nno-exact: true\nname: [a, b]\nbatch_rows: 5\nform: fp8\n")
    assert run("--config", file, "--size", 6) == (0, "", "")
    own = Input(Path("m"), 12, 6, "fp8", ("a", "b"), exact=False)
    assert calls == [(own, Cheap(rows=5), False)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sise: 3\n", "the key sise; expected flags of medusa-try; did you mean size?"),
        ("zzz: 3\n", "the key zzz; expected flags of medusa-try; see medusa-try --help"),
        ("- 3\n", "no mapping"),
        ("model: m\nform: fp9\n", "--form: got 'fp9'"),
        ("model: m\nsize: two\n", "flags.yaml: --size: got 'two'; expected an integer; correct it"),
        ("model: m\nsize: true\n", "flags.yaml: --size: got True; expected an integer; correct it"),
        ("model: m\nsize: 2.5\n", "flags.yaml: --size: got 2.5; expected an integer; correct it"),
        (
            "model: m\nfast: maybe\n",
            "flags.yaml: --fast: got 'maybe'; expected a value that the flag takes; correct it",
        ),
    ],
)
def test_a_wrong_file(text: str, message: str, run: Callable[..., Any], tmp_path: Path, calls: Calls) -> None:
    (tmp_path / "flags.yaml").write_text(text)
    code, _, err = run("--config", tmp_path / "flags.yaml")
    assert (code, calls) == (2, [])
    assert message in err


def test_an_empty_file_has_no_flags(run: Callable[..., Any], calls: Calls, tmp_path: Path) -> None:
    (tmp_path / "flags.yaml").write_text(run("part", "--print-config")[1])
    assert run("part", "--config", tmp_path / "flags.yaml") == (0, "", "")
    assert calls == [(Cheap(),)]


def test_version(run: Callable[..., Any]) -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("medusa-export ")


def test_choices_are_completed(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_MEDUSA_TRY_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "medusa-try --form f")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert run()[1].split() == ["fp8"]


def test_given_knows_whose_flags_they_are() -> None:
    given = Given(rate=1.0, batch_rows=2)
    assert given.without(Dear) == ["batch_rows"]
    assert given.without(Cheap, Dear) == []
    assert given.build(Dear, base="joint") == Dear(1.0, "joint")


def test_the_app_is_a_plain_one() -> None:
    assert isinstance(command_app(), typer.Typer)
