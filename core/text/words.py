"""Numbers in sentences."""

from __future__ import annotations

HISSING = ("s", "x", "ch", "sh")


def counted(number: int, noun: str) -> str:
    """1 tie, 2 ties, 0 mismatches."""
    ending = "es" if noun.endswith(HISSING) else "s"
    return f"{number} {noun}{'' if number == 1 else ending}"
