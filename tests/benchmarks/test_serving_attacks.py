"""The attacks that take no time, on a real medusa-serve with the tiny engine that the benchmarks make."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import typer

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
QUICK = ["two lengths", "another host", "deep nesting", "a grammar that explodes", "5000 made-up fields"]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # which its dataclasses look for
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def attacks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark; its own modules are gone after the test."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    found = load("serving_attacks")
    for name in set(sys.modules) - before:
        if name.startswith(("serving_", "tiny_")):
            monkeypatch.delitem(sys.modules, name)
    return found


def test_quick_ones(attacks: ModuleType, tmp_path: Path) -> None:
    load("tiny_engine").main(tmp_path / "tiny", prompts=2)
    attacks.ATTACKS["what is expected"] = attacks.Attack(lambda port: "200", "400")
    with pytest.raises(typer.Exit):
        attacks.main(tmp_path / "tiny" / "engine", [*QUICK, "what is expected"], tmp_path / "attacks.json")
    rows = json.loads((tmp_path / "attacks.json").read_text())
    assert [(row["attack"], row["right"]) for row in rows] == [
        *((name, True) for name in QUICK),
        ("what is expected", False),
    ]
    assert all(row["honest"] >= attacks.ANSWERS and not row["wrong"] for row in rows)
