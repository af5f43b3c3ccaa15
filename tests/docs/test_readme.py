"""What README.md says exists: its commands, its targets, its file tree, the table that the quickstart prints."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_export.exporter.job.output_forms import OUTPUT_FORMS
from medusa_export.exporter.sizing.gpus import GPUS
from medusa_export.exporter.verify.error_table import COLUMNS
from medusa_export.heads.checkpoint.families import FAMILIES
from medusa_export.quantize.format_facts import TensorRt
from medusa_export.quantize.formats import FORMATS, KV_CACHE
from tests.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXPORT = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    ((?:medusa-|make ).*?)(?:\s+#.*)?$", README + EXPORT, flags=re.MULTILINE)
LARGEST = 8192  # bytes that a stranger reads before deciding


def section(name: str, text: str = EXPORT) -> str:
    """What stands between ``<!-- name -->`` and ``<!-- end -->``."""
    return text.split(f"<!-- {name} -->\n", 1)[1].split("<!-- end -->", 1)[0]


def matrix() -> str:
    """What is supported, and how far it was seen, from the tables that the export itself is derived from."""
    head = ["`--quant`", "TensorRT-LLM checkpoint", "TensorRT-RTX engine", "ONNX Runtime engine", "Hugging Face (`hf`)"]
    rows = [
        [f"`{name}`", "built here, engine never run", "built here, GPU never run" if isinstance(form.tensorrt, TensorRt) else "-",
         "run here" if form.onnxruntime else "-", "built here" if form.huggingface else "-"]
        for name, form in FORMATS.items()
    ]  # fmt: skip
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


@pytest.mark.parametrize(
    ("document", "name", "expected"),
    [("README.md", "matrix", matrix)],
)
def test_generated_section(document: str, name: str, expected: Callable[[], str]) -> None:
    """``MEDUSA_EXPORT_GOLDEN=write`` rewrites the section."""
    path, mark = ROOT / document, f"<!-- {name} -->\n"
    text = path.read_text(encoding="utf-8")
    if os.environ.get("MEDUSA_EXPORT_GOLDEN") == "write":
        path.write_text(text.replace(mark + section(name, text), mark + expected()), encoding="utf-8")
        return
    assert section(name, text) == expected()


def test_the_readme_is_short() -> None:
    assert len(README.encode()) <= LARGEST


def script(path: str) -> Any:
    """A script of the documents as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_commands_is_what_the_script_writes() -> None:
    """``make docs`` rewrites it."""
    written = script("docs/command_reference.py").page()
    assert written == (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    commands = re.findall(r"^##+ (medusa-.*)$", written, flags=re.MULTILINE)
    assert {path.stem for path in (ROOT / "tests/golden/help").iterdir()} == {
        name.replace(" ", "-") for name in commands
    }
    assert "- `--quant [none|fp8|fp8_rowwise|" in written
    assert r"'\*mlp.proj\*'" in written


def test_the_page_of_formats_is_what_the_script_writes() -> None:
    """``make docs`` rewrites it."""
    reference = script("docs/format_reference.py")
    assert reference.page() == (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    assert reference.measured_loss()["int8_wo"] == ("0.0043", "97.5%")  # as docs/tensorrt.md has it
    assert set(FORMATS) - set(reference.measured_loss()) == {"w4a8_awq"}
    bits = {name: reference.engine_bits(FORMATS[name]) for name in ("none", "fp8", "int4_awq", "nvfp4")}
    assert bits == {"none": 16, "fp8": 8, "int4_awq": 4.125, "nvfp4": 4.5}
    quantized = FORMATS["int4_awq"].trtllm.parts[0]
    assert list(reference.part_row(quantized))[:3] == ["`weight`", "int8", "[out/2, in]"]


def test_pictures_are_what_the_script_draws() -> None:
    draw = script("docs/pictures/draw.py")
    drawn = {"overview": draw.overview(), "packages": draw.packages()}
    drawn |= {name: draw.chain(*arguments) for name, arguments in draw.CHAINS.items()}
    found = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs/pictures").glob("*.svg")}
    assert found == drawn


def test_every_page_is_in_the_site() -> None:
    site = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    named = set(re.findall(r'"([\w./-]+\.md)"', site))
    assert named == {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}


def test_every_choice_is_named() -> None:
    for name in (*OUTPUT_FORMS, *FAMILIES):
        assert re.search(rf"^\|.*`{name}`.*\|", EXPORT, flags=re.MULTILINE), name
    for name in FORMATS:
        assert f"`{name}`" in EXPORT.split("`--quant` takes", 1)[1].split("\n\n")[0], name
    for name in KV_CACHE:
        assert f"`{name}`" in EXPORT.split("`--kv-cache` takes", 1)[1].split("\n\n")[0], name


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
        "tokens/s, decoding",
        "tokens/s, whole answers",
        "speed-up, decoding (95% CI)",
        "speed-up, whole answers (95% CI)",
        "tokens per step",
        "parity",
    ]
    positions = [section("quickstart output", README).find(row) for row in rows]
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
