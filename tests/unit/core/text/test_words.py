"""Numbers in sentences."""

from __future__ import annotations

from medusa_export.core.text.words import counted


def test_one_and_many() -> None:
    assert [counted(number, "tie") for number in (0, 1, 2)] == ["0 ties", "1 tie", "2 ties"]
    assert [counted(number, "mismatch") for number in (1, 3)] == ["1 mismatch", "3 mismatches"]
