"""medusa-run as its user calls it, on a tiny engine: ids and categories as they are, and files that outlive the printing."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.json_fields import read_json
from medusa_export.engines.bench import html_report
from medusa_export.engines.bench import report as bench_report
from medusa_export.engines.bench.diff import print_diff
from medusa_export.engines.bench.report import print_report
from medusa_export.exporter.cli import run as cli_run
from medusa_export.exporter.cli import tree as cli_tree
from medusa_export.exporter.cli.console import plain_console, stdout

ODD = ("[/math]", "a [b] c", ":warning:", "[bold]")  # what rich would take for markup, or for an emoji


@pytest.fixture
def engine(tiny_engine: Callable[..., Any]) -> Path:
    path: Path = tiny_engine(drafts_well=True, eos_token_id=None).path
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"w{n} w{n + 3}", "id": name, "category": name} for n, name in enumerate(ODD)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Exit code of a command in this process."""

    def run(main: Callable[[], None], *arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["medusa-run", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0)

    return run


def test_text_that_looks_like_markup_is_shown_as_it_is(
    engine: Path, prompts: Path, tmp_path: Path, call: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    given = ("--engine", engine, "--prompts", prompts, "--max-new-tokens", 4)
    assert call(cli_run.run_main, *given, "--repeats", 1, "--report", report) == 0
    run = capfd.readouterr().out
    assert call(cli_run.run_main, "diff", report, report) == 0
    diff = capfd.readouterr().out
    assert call(cli_tree.tree_main, "calibrate", *given, "--output", tmp_path / "acceptance.json") == 0
    for printed in (run, diff, capfd.readouterr().out):
        cells = {line.split("│")[1].strip() for line in printed.splitlines() if line.startswith("│")}
        assert cells >= set(ODD)


def test_lines_that_look_like_markup(engine: Path, prompts: Path, tmp_path: Path, call: Callable[..., int]) -> None:
    """Ties, findings, and what two runs differ in."""
    path = tmp_path / "report.json"
    given = ("--engine", engine, "--prompts", prompts, "--max-new-tokens", 4, "--repeats", 1)
    assert call(cli_run.run_main, *given, "--report", path) == 0
    body = read_json(path)
    body["parity"]["divergences"] = [
        {"prompt": name, "verdict": "tie", "position": 3, "logit_gap": 0.5} for name in ODD
    ]
    body["findings"] = [{"name": "prompt", "message": f"prompt {name} was cut"} for name in ODD]
    body["engine"]["precision"] = "[/int8]"
    text = io.StringIO()
    print_report(body, plain_console(file=text, width=120))
    print_diff(body, body | {"device": "[/cores]"}, plain_console(file=text, width=120))
    printed = text.getvalue()
    assert all(f"prompt {name} at token 3" in printed and f"prompt {name} was cut" in printed for name in ODD)
    assert printed.count("[/int8]") == 3, "a title, and both sides of a row"
    assert "and [/cores]" in printed


@pytest.mark.parametrize(
    ("module", "name", "written"),
    [(bench_report, "print_report", {"r.json", "r.html"}), (html_report, "render", {"r.json"})],
)
def test_files_are_written_before_anything_is_shown(
    module: Any, name: str, written: set[str], engine: Path, prompts: Path, tmp_path: Path, call: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What cannot be printed, as to a pipe that nobody reads, must not cost hours."""

    def fail(*_: Any) -> None:
        raise SystemExit(1)

    monkeypatch.setattr(module, name, fail)
    given = ("--engine", engine, "--prompts", prompts, "--max-new-tokens", 4, "--repeats", 1, "--limit", 1)
    out = tmp_path / "out"
    out.mkdir()
    assert call(cli_run.run_main, *given, "--report", out / "r.json", "--html", out / "r.html") == 1
    assert {path.name for path in out.iterdir()} == written
    assert read_json(out / "r.json")["parity"]["prompts"] == 1


def test_the_commands_console_reads_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    stdout.print("".join(ODD), soft_wrap=True)
    assert capsys.readouterr().out == "".join(ODD) + "\n"
