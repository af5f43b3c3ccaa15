"""Two reports of medusa-run side by side: what changed, and whether it can have been chance."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa_export.core.errors import ConfigError
from medusa_export.core.intervals import bootstrap
from medusa_export.core.json_fields import read_json
from medusa_export.engines.bench.report import FEWEST, MODES, interval_text, whole_interval

if TYPE_CHECKING:
    from rich.console import Console

Report = Mapping[str, Any]
# What is read of a report: keys, and what they have. A type, an object of keys, a list of one kind of element, a list of so many.
_MODES = {"baseline": float, "medusa": float}
SHAPE: Mapping[str, Any] = {
    "parity": {"prompts": int, "exact": int, "ties": int, "mismatches": int}, "speedup": {"median": float, "ci95": (float, float)},
    "arguments": {}, "device": str, "engine": {"precision": str}, "findings": [{}], "tree": {"max_draft_len": int},
    "tokens_per_second": _MODES, "tokens_per_step": float, "step_ms": _MODES,
    "categories": [{"category": str, "speedup": float}], "prompts": [{"prompt": object, "tokens": _MODES, "total_ms": _MODES}],
}  # fmt: skip


REPORT, ACTION = "a report of medusa-run", "give a file of medusa-run --report"


def read_report(path: Path) -> dict[str, Any]:
    """What ``medusa-run --report`` wrote.

    Raises:
        ConfigError: another file, or one that somebody has changed.
    """
    body = read_json(path, REPORT, ACTION)
    wrong = _misfit(body, SHAPE, "")
    if wrong:
        raise ConfigError(str(path), wrong, REPORT, ACTION)
    return body


def _misfit(value: Any, shape: Any, where: str) -> str:
    """What does not fit, in words; nothing where all does."""
    if isinstance(shape, Mapping) and isinstance(value, dict):
        missing = next((name for name in shape if name not in value), None)
        if missing is not None:
            return f"no {where}{missing}"
        return next(filter(None, (_misfit(value[name], inner, f"{where}{name}.") for name, inner in shape.items())), "")
    if isinstance(shape, tuple) and isinstance(value, list) and len(value) == len(shape):
        shape = [shape[0]]
    if isinstance(shape, list) and isinstance(value, list):
        return next(filter(None, (_misfit(each, shape[0], where) for each in value)), "")
    kinds: Any = (int, float) if shape is float else shape
    if isinstance(shape, type) and isinstance(value, kinds):
        return ""
    return f"{where.rstrip('.')} = {reprlib.repr(value)}"


def differences(first: Report, second: Report) -> list[str]:
    """What the two were measured on differently, so that their figures are not those of one change."""
    asked = {"engine", "report", "html", "save_outputs"}  # what is expected to differ
    found = [
        f"{name}: {one[name]} and {other.get(name)}"
        for one, other in [(first["arguments"], second["arguments"])]
        for name in one
        if name not in asked and one[name] != other.get(name)
    ]
    return [f"device: {first['device']} and {second['device']}"] * (first["device"] != second["device"]) + found


def changes(first: Report, second: Report) -> dict[str, Any]:
    """Tokens a second of the second over the first on the prompts of both, by mode, with the interval over these prompts.

    Returns:
        the number of prompts, and by mode the ratio and its 95 % interval; None for one of too few prompts.
    """
    ours, theirs = ({row["prompt"]: row for row in body["prompts"]} for body in (first, second))
    common = [(ours[name], theirs[name]) for name in ours if name in theirs]
    found: dict[str, Any] = {"prompts": len(common)}
    for mode in MODES if common else ():
        rows = [
            [value for row in pair for value in (row["tokens"][mode], row["total_ms"][mode])] for pair in common
        ]  # [P, 4]
        ratio = _ratio(*map(sum, zip(*rows, strict=True)))
        interval = [round(value, 4) for value in bootstrap(rows, _ratio)] if len(rows) >= FEWEST else None
        found[mode] = {"ratio": round(ratio, 4), "ci95": interval}
    return found


def _ratio(tokens: Any, ms: Any, other_tokens: Any, other_ms: Any) -> Any:
    return (other_tokens / other_ms) / (tokens / ms)


def print_diff(first: Report, second: Report, console: Console) -> None:
    """A table of both, then what differs between the two runs besides the engine.

    Args:
        first: the earlier report.
        second: the later report.
        console: where it is printed.
    """
    from rich.table import Table

    table = Table("", "A", "B", title_justify="left")
    for name, value in ROWS.items():
        table.add_row(name, value(first), value(second))
    rows = [{row["category"]: row for row in body["categories"]} for body in (first, second)]
    for category in dict.fromkeys([*rows[0], *rows[1]]):
        table.add_row(
            f"speed-up, {category}", *(f"{row[category]['speedup']:.2f}x" if category in row else "-" for row in rows)
        )
    console.print(table)
    found = changes(first, second)
    for mode, words in zip(MODES, ("without", "with"), strict=True):
        if mode in found:
            said = f"{found[mode]['ratio']:.2f}x (95%: {interval_text(found[mode]['ci95'])})"
            console.print(f"B is {said} as fast as A {words} Medusa, on {found['prompts']} prompts of both.")
    if not found["prompts"]:
        console.print("The two have no prompt in common.")
    for line in differences(first, second):
        console.print(f"differs: {line}", soft_wrap=True, markup=False)


ROWS: dict[str, Callable[[Report], str]] = {
    "engine": lambda body: str(body["engine"]["precision"]),
    "prompts": lambda body: str(body["parity"]["prompts"]),
    "tokens/s without Medusa": lambda body: f"{body['tokens_per_second']['baseline']:.1f}",
    "tokens/s with Medusa": lambda body: f"{body['tokens_per_second']['medusa']:.1f}",
    "speed-up": lambda body: f"{body['speedup']['median']:.2f}x ({interval_text(whole_interval(body))})",
    "tokens per step": lambda body: f"{body['tokens_per_step']:.2f}",
    "draft tokens": lambda body: str(body["tree"]["max_draft_len"]),
    "step without / with, ms": lambda body: f"{body['step_ms']['baseline']:.1f} / {body['step_ms']['medusa']:.1f}",
    "exact, ties, mismatches": lambda body: ", ".join(
        str(body["parity"][name]) for name in ("exact", "ties", "mismatches")
    ),
    "findings": lambda body: str(len(body["findings"])),
}
