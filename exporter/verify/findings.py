"""What a check found: the check's name, and a line for people. Many of a kind are five and a count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from medusa_export.core.errors import MedusaExportError

SHOWN = 5


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        check: which check sees it; docs/trust.md lists all.
        message: what is wrong, cause first.
    """

    check: str
    message: str


class Findings(list[Finding]):
    """What was found so far, in the order of the checks."""

    def say(self, check: str, messages: Iterable[str]) -> bool:
        """Add lines of one check. Returns whether there were any."""
        before = len(self)
        self += [Finding(check, message) for message in messages]
        return len(self) > before

    @contextmanager
    def guarded(self, check: str) -> Iterator[None]:
        """What a reader raises on a written file is a finding; the remedy is another export, never another download."""
        try:
            yield
        except MedusaExportError as error:
            self.append(Finding(check, own_words(error)))


def own_words(error: MedusaExportError) -> str:
    """An error about a file of an export: readers advise what to do with a downloaded checkpoint."""
    text = str(error)
    return f"{text.removesuffix(error.action)}export again" if text.endswith(error.action) else text


def shortened(findings: Iterable[Finding]) -> list[str]:
    """Lines to print, those of one check together, at most five of each."""
    by_check: dict[str, list[str]] = {}
    for finding in findings:
        by_check.setdefault(finding.check, []).append(finding.message)
    lines = []
    for check, messages in by_check.items():
        lines += [f"{check}: {message}" for message in messages[:SHOWN]]
        if len(messages) > SHOWN:
            lines.append(f"{check}: ... and {len(messages) - SHOWN} more")
    return lines
