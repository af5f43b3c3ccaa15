"""What a user reads when something is wrong, and what is left that asks for a report."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from medusa_export.core.errors import REPORT, ConfigError, InternalError
from tests.paths import ROOT

SOURCES = ("core", "heads", "quantize", "exporter", "engines")
# Where an InternalError is made -> why no input of a user's gets there.
INTERNAL = {
    "quantize/ptq.py: _amax": "ModelOpt is pinned, the rules are ours, and every linear runs on every prompt",
    "exporter/write/safetensors.py: write": "entries and tensors come from one plan",
    "exporter/write/safetensors.py: _disagree": "shapes and types were checked against config.json when the source was opened",
    "exporter/write/safetensors.py: __exit__": "entries and tensors come from one plan",
    "exporter/write/safetensors.py: _torch_dtype": "types are those of the formats' table",
    "exporter/write/safetensors.py: _header": "names are ours, not the source's",
    "exporter/pipeline/export.py: _refusal": "inputs that change, models that overflow and what a format loses are said as such",
}


def test_one_printable_line() -> None:
    error = ConfigError("a\x1b[31m", "two\nlines", "one", "see\tthere")
    assert str(error) == "a\\x1b[31m: got two lines; expected one; see there"


def test_an_internal_error_asks_for_a_report() -> None:
    assert str(InternalError("here", "two", "one")) == f"here: got two; expected one; {REPORT}"


def test_nothing_else_asks_for_a_report() -> None:
    for path in _sources():
        if path != ROOT / "core" / "errors.py":
            assert "report this" not in path.read_text("utf-8").lower(), path


def test_internal_errors_are_those_that_no_input_reaches() -> None:
    found = {f"{path.relative_to(ROOT).as_posix()}: {name}" for path in _sources() for name in _makers(path)}
    assert found == INTERNAL.keys()


def _sources() -> Iterator[Path]:
    for folder in SOURCES:
        yield from sorted((ROOT / folder).rglob("*.py"))


def _makers(path: Path) -> Iterator[str]:
    """Functions that make an InternalError."""
    text = path.read_text("utf-8")
    for node in ast.walk(ast.parse(text)) if "InternalError(" in text else ():
        if isinstance(node, ast.FunctionDef) and any(
            isinstance(inner, ast.Call) and getattr(inner.func, "id", "") == "InternalError" for inner in ast.walk(node)
        ):
            yield node.name
