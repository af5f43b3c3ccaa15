"""The share of faults that verify finds, by check, and those that it does not."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medusa_export.exporter.cli.verify import run_written_engine, triton_repository
from medusa_export.exporter.verify.parts.export import verify
from tests.faults.mutations import Fault, mend


@dataclass
class Outcome:
    """What became of some faults.

    Attributes:
        by_check: which check saw a fault first -> how many.
        missed: names of the faults that nothing saw.
        crashed: name -> what was raised instead of being said.
    """

    total: int = 0
    by_check: Counter[str] = field(default_factory=Counter)
    missed: list[str] = field(default_factory=list)
    crashed: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Found, of all."""
        return sum(self.by_check.values()) / max(1, self.total)

    def add(self, other: Outcome) -> None:
        """Take another outcome in."""
        self.total += other.total
        self.by_check.update(other.by_check)
        self.missed += other.missed
        self.crashed |= other.crashed
        self.messages |= other.messages


def measure(out: Path, faults: Iterable[Fault], work: Path, *, with_source: bool) -> Outcome:
    """Apply each fault to a copy, and verify that.

    Args:
        out: a good export.
        work: a directory for copies; files are linked, and those that are changed replaced.
        with_source: whether the inputs that it was made from may be looked at.
    """
    outcome, source = Outcome(), out.parent
    good = _findings(out, source if with_source else None)
    if good:
        raise AssertionError(f"the good export has findings: {good}")
    for fault in faults:
        copy = work / "copy"
        shutil.copytree(out, copy, copy_function=os.link)
        fault.apply(copy)
        if fault.file != "medusa.json":
            mend(copy)
        outcome.total += 1
        try:
            found = _findings(copy, source if with_source else None)
        except Exception as error:  # a crash is a result: it is not what a user may see
            outcome.crashed[fault.name] = f"{type(error).__name__}: {error}"
        else:
            if found:
                outcome.by_check[found[0].check] += 1
                outcome.messages[fault.name] = f"{found[0].check}: {found[0].message}"
            else:
                outcome.missed.append(fault.name)
        shutil.rmtree(copy)
    return outcome


def _findings(out: Path, source: Path | None) -> list[Any]:
    """With the source; without one, which has to be out of the way, from the files alone."""
    repository = triton_repository(out, source and source / "model", source and source / "heads", quick=False)
    if repository is not None:
        return list(repository.findings)
    if source is not None:
        return list(verify(out, ckpt=source / "model", heads=source / "heads", run_engine=run_written_engine).findings)
    return list(verify(out, run_engine=run_written_engine).findings)
