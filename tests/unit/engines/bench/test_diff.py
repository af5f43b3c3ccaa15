"""Two reports side by side, from made-up runs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from medusa_export.core.errors import ConfigError
from medusa_export.engines.bench.diff import SHAPE, changes, differences, print_diff, read_report
from tests.unit.engines.bench.test_report import SAME, prompt, report


def test_only_prompts_of_both_count() -> None:
    """13 tokens each; b is twice as fast with Medusa on what both have, and as fast without."""
    first = report([prompt(name, "x", [130.0], [100.0]) for name in "abcd"])
    second = report([prompt(name, "x", [130.0], [50.0]) for name in "abc"] + [prompt("e", "x", [1e4], [1e4])])
    assert changes(first, second) == {
        "prompts": 3,
        "baseline": {"ratio": 1.0, "ci95": [1.0, 1.0]},
        "medusa": {"ratio": 2.0, "ci95": [2.0, 2.0]},
    }
    assert changes(first, report(SAME))["medusa"]["ci95"] is None
    assert changes(first, report([prompt("z", "x", [1.0], [1.0])])) == {"prompts": 0}


def test_what_is_printed() -> None:
    first, second = (
        report(SAME, limit=2),
        report([*SAME, prompt("c", "maths", [130.0], [65.0])], limit=3, engine="other"),
    )
    text = io.StringIO()
    print_diff(first, second, Console(file=text, width=100))
    shown = text.getvalue()
    rows = {
        cells[0]: cells[1:]
        for line in shown.splitlines()
        if (cells := [cell.strip() for cell in line.split("│")[1:-1]])
    }
    assert rows["prompts"] == ["2", "3"]
    assert rows["speed-up, maths"] == ["-", "2.00x"]
    assert rows["speed-up"][0] == "1.86x (-)"
    assert "B is 1.00x (95%: -) as fast as A with Medusa, on 2 prompts of both." in shown
    assert "differs: limit: 2 and 3" in shown
    assert "engine: " not in shown


def test_another_machine_is_said() -> None:
    first, second = report(SAME), report(SAME) | {"device": "1 core of another"}
    assert differences(first, second) == [f"device: {first['device']} and 1 core of another"]


def test_no_report(tmp_path: Path) -> None:
    whole: dict[str, Any] = report(SAME)
    (tmp_path / "r.json").write_text(json.dumps(whole))
    assert read_report(tmp_path / "r.json") == whole
    assert whole.keys() >= set(SHAPE)
    (tmp_path / "r.json").write_text(json.dumps({key: value for key, value in whole.items() if key != "tree"}))
    with pytest.raises(ConfigError, match="no tree"):
        read_report(tmp_path / "r.json")


@pytest.mark.parametrize(
    "change",
    [
        {"arguments": 3}, {"device": []}, {"engine": {}}, {"engine": {"precision": 3}}, {"findings": {}}, {"findings": [3]},
        {"parity": 3}, {"speedup": {"median": 1, "ci95": [1]}}, {"speedup": {"median": "1", "ci95": [1, 2]}}, {"prompts": [3]},
        {"categories": [{"category": "x", "speedup": "fast"}]}, {"tree": None}, {"tokens_per_second": {"baseline": 1}},
        {"step_ms": "3"}, {"tokens_per_step": None},
    ],
)  # fmt: skip
def test_a_damaged_report(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "r.json").write_text(json.dumps(report(SAME) | change))
    with pytest.raises(ConfigError, match="expected a report of medusa-run"):
        read_report(tmp_path / "r.json")
