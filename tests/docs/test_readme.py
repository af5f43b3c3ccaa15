"""What README.md says exists: its commands, its targets, its file tree, the table that the quickstart prints."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from medusa_export.exporter.job.arguments import FORMS
from medusa_export.exporter.sizing.gpus import GPUS
from medusa_export.exporter.verify.error_table import COLUMNS
from medusa_export.heads.checkpoint.families import FAMILIES
from medusa_export.quantize.formats import FORMATS, KV_CACHE

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ("heads", "quantize", "exporter", "engines", "examples", "benchmarks")
COMMANDS = re.findall(r"^    ((?:medusa-|make ).*?)(?:\s+#.*)?$", README, flags=re.MULTILINE)


def section(name: str) -> str:
    """What stands between ``<!-- name -->`` and ``<!-- end -->``."""
    return README.split(f"<!-- {name} -->\n", 1)[1].split("<!-- end -->", 1)[0]


def file_tree() -> str:
    """Every source file with the first line of its docstring; other files of the folders are in their README."""
    rows = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*.py")):
            summary = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]
            name = folder if path.name == "__init__.py" else f"{folder}/{path.name}"
            rows.append(f"| `{name}` | {summary.rstrip('.')} |")
    return "\n".join(["| file | what |", "|---|---|", *rows]) + "\n"


def format_table() -> str:
    """Every weight format, from the table that the export itself is derived from."""
    rows = []
    for form in FORMATS.values():
        gpus = f"{form.min_sm} and newer" if form.max_sm is None else f"{form.min_sm} .. {form.max_sm}"
        switches = ("yes" if yes else "no" for yes in (form.needs_calibration, form.quantizes_heads, form.onnx))
        rows.append([f"`{form.name}`", form.description, form.quant_algo or "-", gpus, *switches])
    head = ["`--quant`", "weights and activations", "`quant_algo`", "GPUs (SM)", "prompts", "heads", "CPU"]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


@pytest.mark.parametrize(("name", "expected"), [("files", file_tree), ("formats", format_table)])
def test_generated_section(name: str, expected: Callable[[], str]) -> None:
    """``MEDUSA_EXPORT_GOLDEN=write`` rewrites the section."""
    if os.environ.get("MEDUSA_EXPORT_GOLDEN") == "write":
        path, mark = ROOT / "README.md", f"<!-- {name} -->\n"
        path.write_text(
            path.read_text(encoding="utf-8").replace(mark + section(name), mark + expected()), encoding="utf-8"
        )
        return
    assert section(name) == expected()


def test_every_choice_is_named() -> None:
    for name in (*FORMS, *FAMILIES):
        assert re.search(rf"^\|.*`{name}`.*\|", README, flags=re.MULTILINE), name
    for name in KV_CACHE:
        assert f"`{name}`" in README.split("`--kv-cache` takes", 1)[1].split("\n\n")[0], name


def test_make_targets() -> None:
    targets = {
        line.split(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if re.match(r"[a-z]+:", line)
    }
    named = {command.split()[1] for command in COMMANDS if command.startswith("make ")}
    assert named == {"quickstart", "test"}
    assert named <= targets


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("medusa-")])
def test_commands_exist_with_these_flags(command: str) -> None:
    name, *arguments = shlex.split(command)
    program = Path(sys.executable).with_name(name)
    subcommand = [arguments[0]] if not arguments[0].startswith("-") else []
    wide = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    text = subprocess.run([program, *subcommand, "--help"], capture_output=True, text=True, check=True, env=wide).stdout
    for flag in (argument for argument in arguments if argument.startswith("--")):
        assert re.search(rf"{flag}\b", text), flag


def test_paths_in_commands_are_made_or_shipped() -> None:
    made = "quickstart/"  # by make quickstart
    for command in COMMANDS:
        for word in shlex.split(command)[1:]:
            if "/" in word and not word.startswith(made):
                assert (ROOT / word).exists(), word


def test_quickstart_output_is_one() -> None:
    rows = [
        "prompts",
        "tokens/s without Medusa",
        "tokens/s with Medusa",
        "speed-up (95% CI)",
        "tokens per step",
        "parity",
    ]
    positions = [section("quickstart output").find(row) for row in rows]
    assert all(position >= 0 for position in positions)
    assert positions == sorted(positions)


def test_samples_have_the_columns_that_are_printed() -> None:
    assert re.findall(r"^  (\w+-\d+GB) ", section("plan output"), flags=re.MULTILINE) == [gpu.name for gpu in GPUS]
    header = section("verify output").splitlines()[2]
    assert [cell.strip() for cell in header.split("┃")[1:-1]] == ["layer", *COLUMNS, "max |error|"]


def test_links_resolve() -> None:
    for document in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
    ]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"
