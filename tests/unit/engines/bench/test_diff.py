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
from medusa_export.engines.bench.runner import PromptResult
from tests.unit.engines.bench.test_report import SAME, prompt, report, run


def test_only_prompts_of_both_count() -> None:
    """13 tokens each, 10 ms of prefill; b is twice as fast with Medusa on what both have, and as fast without."""
    first = report([prompt(name, "x", [130.0], [100.0]) for name in "abcd"])
    second = report([prompt(name, "x", [130.0], [50.0]) for name in "abc"] + [prompt("e", "x", [1e4], [1e4])])
    assert changes(first, second) == {
        "prompts": 3,
        "decoding": {
            "baseline": {"ratio": 1.0, "ci95": [1.0, 1.0]},
            "medusa": {"ratio": 2.25, "ci95": [2.25, 2.25]},
        },
        "whole answers": {
            "baseline": {"ratio": 1.0, "ci95": [1.0, 1.0]},
            "medusa": {"ratio": 2.0, "ci95": [2.0, 2.0]},
        },
    }
    assert changes(first, report(SAME))["whole answers"]["medusa"]["ci95"] is None
    nothing = {"prompts": 0, "decoding": {}, "whole answers": {}}
    assert changes(first, report([prompt("z", "x", [11.0], [11.0])])) == nothing


def test_answers_of_one_token() -> None:
    first = report([PromptResult(name, "x", [1], [run(1, 0.0, [], 10)], [run(1, 0.0, [], 10)]) for name in "ab"])
    found = changes(first, first)
    assert (found["decoding"], found["whole answers"]["medusa"]["ratio"]) == ({}, 1.0)
    text = io.StringIO()
    print_diff(first, first, Console(file=text, width=80))
    assert "With drafts, B is 1.00x as fast as A in whole answers, on 2 prompts of both." in unwrapped(text)


def unwrapped(text: io.StringIO) -> str:
    return " ".join(text.getvalue().split())


def test_what_is_printed() -> None:
    first, second = (
        report(SAME, limit=2),
        report([*SAME, prompt("c", "maths", [130.0], [65.0])], limit=3, engine="other", drafts="text"),
    )
    text = io.StringIO()
    print_diff(first, second, Console(file=text, width=84))
    shown = text.getvalue()
    rows = {
        cells[0]: cells[1:]
        for line in shown.splitlines()
        if (cells := [cell.strip() for cell in line.split("│")[1:-1]])
    }
    assert rows["prompts"] == ["2", "3"]
    assert rows["maths"] == ["-", "2.18x", "-", "2.00x"]
    assert rows["speed-up, decoding"] == ["2.00x", "2.06x (2.00 .. 2.18)"]
    assert rows["speed-up, whole answers"] == ["1.86x", "1.90x (1.86 .. 2.00)"]
    assert rows["tokens/s, decoding"] == ["100.0 without, 200.0 with", "100.0 without, 205.7 with"]
    assert rows["drafts from"] == ["heads, in a tree of 3", "text"]
    said = (
        "With drafts, B is 1.00x as fast as A in decoding and 1.00x as fast as A in whole answers, on 2 prompts of both"
    )
    assert said in unwrapped(text)
    assert "differs: limit: 2 and 3" in shown
    assert "engine: " not in shown


def test_intervals_are_named() -> None:
    first = report([prompt(name, "x", [130.0], [100.0]) for name in "abc"])
    second, text = report([prompt(name, "x", [130.0], [50.0]) for name in "abc"]), io.StringIO()
    print_diff(first, second, Console(file=text, width=84))
    assert "With drafts, B is 2.25x (95%: 2.25 .. 2.25) as fast as A in decoding" in unwrapped(text)
    one = report(SAME[:1])
    print_diff(one, one, Console(file=text, width=84))
    assert "on 1 prompt of both" in unwrapped(text)


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
    (tmp_path / "r.json").write_text(json.dumps(report([SAME[0], SAME[0]])))
    with pytest.raises(ConfigError, match="the prompt a more than once"):
        read_report(tmp_path / "r.json")


@pytest.mark.parametrize(
    "change",
    [
        {"arguments": 3}, {"device": []}, {"engine": {}}, {"engine": {"precision": 3}}, {"findings": {}}, {"findings": [3]},
        {"parity": 3}, {"speedup": {"median": 1, "ci95": [1]}}, {"speedup": {"median": "1", "ci95": [1, 2]}}, {"prompts": [3]},
        {"decode_speedup": {"median": None}}, {"decode_speedup": {"median": "2", "ci95": None}}, {"decode_speedup": None},
        {"decode_speedup": {"median": 2, "ci95": [1]}}, {"categories": [{"category": "x", "speedup": "?", "decode_speedup": None}]},
        {"tree": None}, {"drafts": []}, {"drafts": [{"drafts": "words"}]}, {"drafts": [{}]},
        {"tokens_per_second": {"baseline": 1}}, {"step_ms": "3"}, {"tokens_per_step": None},
    ],
)  # fmt: skip
def test_a_damaged_report(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "r.json").write_text(json.dumps(report(SAME) | change))
    with pytest.raises(ConfigError, match=r"expected a report of this version's medusa-run; .* made again"):
        read_report(tmp_path / "r.json")
