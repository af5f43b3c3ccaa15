"""Names with an underscore in front are a module's own: no source imports one, and no test reaches into an object for one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.unit.test_architecture import SOURCES

TESTS = {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / "tests").rglob("*.py"))}
EXCEPTIONS = {
    # it plants faults inside the engine, which no public way should offer
    "tests/integration/test_seeded_faults.py": {"engine_module._Block", "self._engine._hidden"},
    # a model of the python backend without Triton, whose own module its initialize() needs
    "tests/unit/engines/serving/triton/test_model.py": {
        "model._lock",
        "model._meter",
        "model._open",
        "model._service",
        "model._take",
    },
    # ModelOpt's packed tensor, which it has no public name for
    "tests/unit/quantize/test_numerics.py": {"quantized._quantized_data"},
}
BY_NAME = ("setattr", "getattr", "delattr", "hasattr")


def reached(text: str) -> Iterator[str]:
    """Private members of other modules' objects that a file names: imported, as attributes, or as strings for ``setattr``."""
    tree = ast.parse(text)
    own = set(_defined(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names if _is_private(alias.name))
        elif isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in own:
            if ast.unparse(node.value) not in ("self", "cls"):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in BY_NAME:
            words = [word.value for word in node.args[:2] if isinstance(word, ast.Constant)]
            names = [str(word).rpartition(".")[2] for word in words]
            is_own = isinstance(node.args[0], ast.Name) and node.args[0].id in ("self", "cls")
            yield from (f"{ast.unparse(node.args[0])}, {name}" for name in names if _is_private(name) and not is_own)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _defined(tree: ast.Module) -> Iterator[str]:
    """What a file itself defines: its functions, methods, and the attributes of its classes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def in_files(files: dict[str, Path]) -> dict[str, set[str]]:
    found = {name: set(reached(path.read_text("utf-8"))) for name, path in files.items()}
    return {name: members for name, members in found.items() if members}


def test_tests_use_public_names() -> None:
    assert in_files(TESTS) == EXCEPTIONS


def test_no_source_imports_a_private_name() -> None:
    imported = {
        f"{name}: {node.module}.{alias.name}"
        for name, path in SOURCES.items()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("medusa_export")
        for alias in node.names
        if _is_private(alias.name)
    }
    assert imported == set()


@pytest.mark.parametrize(
    ("text", "member"),
    [
        ("from medusa_export.quantize.ptq import _attach", "medusa_export.quantize.ptq._attach"),
        ("engine._rows[0]", "engine._rows"),
        ("made[-1].scheduler._eos = set()", "made[-1].scheduler._eos"),
        ("monkeypatch.setattr(hashing, '_CHUNK', 2)", "hashing, _CHUNK"),
        ("monkeypatch.setattr('medusa_export.core.hashing._CHUNK', 2)", "'medusa_export.core.hashing._CHUNK', _CHUNK"),
        ("class A:\n  def __init__(self):\n    self._x = 1\n  def f(self, other):\n    return other._x", None),
        ("value.__class__", None),
    ],
)
def test_the_scan_finds(text: str, member: str | None) -> None:
    assert list(reached(text)) == ([member] if member else [])
