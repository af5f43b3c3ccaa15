"""Two reports of medusa-run side by side: what changed, and whether it can have been chance."""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medusa_export.core.errors import ConfigError
from medusa_export.core.intervals import bootstrap
from medusa_export.core.json_fields import read_json
from medusa_export.core.text.words import counted
from medusa_export.engines.bench.report import rate_texts, speedup_texts
from medusa_export.engines.bench.speeds import FEWEST, MODES, ratio, times_text, with_interval
from medusa_export.engines.bench.wording import SOURCES, sources

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Report = Mapping[str, Any]


@dataclass(frozen=True)
class OrNull:
    """What may be null in a report."""

    shape: Any


@dataclass(frozen=True)
class FirstOf:
    """A list of which the first element is read; there may be more."""

    shape: Any


@dataclass(frozen=True)
class OneOf:
    """A word that has to be one of these."""

    words: tuple[str, ...]


# What is read of a report: keys, and what they have. A type, an object of keys, a list of one kind of element, a list of so many.
_MODES = dict.fromkeys(MODES, float)
SHAPE: Mapping[str, Any] = {
    "parity": {"prompts": int, "exact": int, "ties": int, "mismatches": int}, "speedup": {"median": float, "ci95": (float, float)},
    "decode_speedup": {"median": OrNull(float), "ci95": OrNull((float, float))},
    "arguments": {}, "device": str, "engine": {"precision": str}, "findings": [{}], "tree": {"max_draft_len": int},
    "drafts": FirstOf({"drafts": OneOf(tuple(SOURCES))}),
    "decode_tokens_per_second": {name: OrNull(float) for name in MODES}, "tokens_per_second": _MODES, "tokens_per_step": float,
    "step_ms": _MODES, "categories": [{"category": str, "speedup": float, "decode_speedup": OrNull(float)}],
    "prompts": [{"prompt": str, "tokens": _MODES, "total_ms": _MODES, "decode_ms": _MODES}],
}  # fmt: skip


REPORT = "a report of this version's medusa-run"
ACTION = "give a file of medusa-run --report, made again if an older version wrote it"


def read_report(path: Path) -> dict[str, Any]:
    """What ``medusa-run --report`` wrote.

    Raises:
        ConfigError: another file, or one that somebody has changed.
    """
    body = read_json(path, REPORT, ACTION)
    wrong = _misfit(body, SHAPE, "")
    if wrong:
        raise ConfigError(str(path), wrong, REPORT, ACTION)
    ids = Counter(row["prompt"] for row in body["prompts"])
    again = next((name for name, count in ids.items() if count > 1), None)
    if again is not None:
        raise ConfigError(str(path), f"the prompt {again} more than once", "every prompt once", "measure anew")
    return body


def _misfit(value: Any, shape: Any, where: str) -> str:
    """What does not fit, in words; nothing where all does."""
    if isinstance(shape, OrNull):
        return "" if value is None else _misfit(value, shape.shape, where)
    if isinstance(shape, FirstOf) and isinstance(value, list) and value:
        return _misfit(value[0], shape.shape, where)
    if isinstance(shape, OneOf) and value in shape.words:
        return ""
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
    """Tokens a second of the second over the first on the prompts of both, with the interval over these prompts.

    Returns:
        the number of prompts; of decoding and of whole answers, by mode, the ratio and its 95 % interval, None of too few prompts. A
        mode in which no prompt of both was decoded is left out.
    """
    ours, theirs = ({row["prompt"]: row for row in body["prompts"]} for body in (first, second))
    common = [(ours[name], theirs[name]) for name in ours if name in theirs]
    found: dict[str, Any] = {"prompts": len(common)}
    for name, timed in TIMED.items():
        rows = {mode: [[value for row in pair for value in timed(row, mode)] for pair in common] for mode in MODES}
        found[name] = {mode: _change(pairs) for mode in MODES if (pairs := [row for row in rows[mode] if all(row)])}
    return found


def _change(rows: Sequence[Sequence[float]]) -> dict[str, Any]:
    interval = [round(value, 4) for value in bootstrap(rows, ratio)] if len(rows) >= FEWEST else None
    return {"ratio": round(float(ratio(*np.sum(rows, axis=0))), 4), "ci95": interval}


def _timed_decoding(row: Mapping[str, Any], mode: str) -> tuple[float, float]:
    """A prompt's tokens behind its prefill, and their milliseconds."""
    return row["tokens"][mode] - 1, row["decode_ms"][mode]


def _timed_whole(row: Mapping[str, Any], mode: str) -> tuple[float, float]:
    return row["tokens"][mode], row["total_ms"][mode]


TIMED = {"decoding": _timed_decoding, "whole answers": _timed_whole}


def print_diff(first: Report, second: Report, console: Console) -> None:
    """A table of both, then what differs between the two runs besides the engine.

    Args:
        first: the earlier report.
        second: the later report.
        console: where it is printed; it takes no text for markup.
    """
    from rich.table import Table

    table = Table("", "A", "B", title_justify="left")
    for name, value in ROWS.items():
        table.add_row(name, value(first), value(second))
    console.print(table)
    console.print(_category_table(first, second))
    found = changes(first, second)
    for mode, words in zip(MODES, ("Without", "With"), strict=True):
        said = [
            f"{with_interval(by_mode[mode]['ratio'], by_mode[mode]['ci95'], name='95%')} as fast as A in {name}"
            for name in TIMED
            if mode in (by_mode := found[name])
        ]
        if said:
            shared = counted(found["prompts"], "prompt")
            console.print(f"{words} drafts, B is {' and '.join(said)}, on {shared} of both.")
    if not found["prompts"]:
        console.print("The two have no prompt in common.")
    for line in differences(first, second):
        console.print(f"differs: {line}", soft_wrap=True)


def _category_table(first: Report, second: Report) -> Table:
    """The speed-ups of both, by category."""
    from rich.table import Table

    table = Table("category", "A, decoding", "B, decoding", "A, whole answers", "B, whole answers")
    rows = [{row["category"]: row for row in body["categories"]} for body in (first, second)]
    for category in dict.fromkeys([*rows[0], *rows[1]]):
        found = [row.get(category, {}) for row in rows]
        table.add_row(category, *(times_text(row.get(key)) for key in ("decode_speedup", "speedup") for row in found))
    return table


ROWS: dict[str, Callable[[Report], str]] = {
    "engine": lambda body: str(body["engine"]["precision"]),
    "prompts": lambda body: str(body["parity"]["prompts"]),
    "tokens/s, decoding": lambda body: rate_texts(body)["decoding"],
    "tokens/s, whole answers": lambda body: rate_texts(body)["whole answers"],
    "speed-up, decoding": lambda body: speedup_texts(body)["decoding"],
    "speed-up, whole answers": lambda body: speedup_texts(body)["whole answers"],
    "tokens per step": lambda body: f"{body['tokens_per_step']:.2f}",
    "drafts from": sources,
    "step without / with, ms": lambda body: f"{body['step_ms']['baseline']:.1f} / {body['step_ms']['medusa']:.1f}",
    "exact, ties, mismatches": lambda body: ", ".join(
        str(body["parity"][name]) for name in ("exact", "ties", "mismatches")
    ),
    "findings": lambda body: str(len(body["findings"])),
}
