"""Commands in the pages have the flags that are written, and the flags take these values."""

from __future__ import annotations

import re

import pytest

from tests.command_lines import unknown_words
from tests.paths import ROOT

PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "commands.md"]
LINES = [
    (path.name, line.strip())
    for path in PAGES
    for line in re.sub(r"\\\n\s*", "", path.read_text(encoding="utf-8")).splitlines()
    if re.match(r"(?:    )?medusa-[a-z]+ (?:[a-z]+ )?\S", line)
]


@pytest.mark.parametrize(("page", "line"), LINES)
def test_commands_of_the_pages(page: str, line: str) -> None:
    assert unknown_words(line) == []


def test_there_are_commands() -> None:
    assert {page for page, _ in LINES} >= {
        "export.md",
        "training.md",
        "trees.md",
        "serving.md",
        "validate.md",
        "qat.md",
    }


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("medusa-export plan --ckpt m --quantt fp8", ["--quantt"]),
        ("medusa-export --ckpt m --quant fp9 --no-quant-heads # --none", ["--quant fp9"]),
        ("medusa-run --engine e --prompts p | tee --append log", []),
        ("medusa-run diff a b --engine e", ["--engine"]),
    ],
)
def test_what_is_wrong_is_found(line: str, found: list[str]) -> None:
    assert unknown_words(line) == found
