"""``python -m tests.faults``: make exports, damage them, print the share that verify finds."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from tests.faults.exports import KINDS, make
from tests.faults.measure import Outcome, measure
from tests.faults.mutations import drawn, faults


def main(
    count: Annotated[int, typer.Option(help="Faults of each export; 0 for all.")] = 200,
    seed: Annotated[int, typer.Option(help="Which ones are drawn.")] = 0,
    kind: Annotated[list[str] | None, typer.Option(help=f"Only these exports: {', '.join(KINDS)}.")] = None,
    without_source: Annotated[bool, typer.Option("--without-source", help="Hide what it was made from.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything here.")] = None,
) -> None:
    """Print found and missed faults by check."""
    whole = Outcome()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        for number, name in enumerate(kind or KINDS):
            root = Path(folder) / str(number)
            out, other = make(name, root / "a"), make(name, root / "b", seed=1)
            every = list(faults(out, other))
            chosen = drawn(every, count or len(every), seed)
            start = time.perf_counter()
            if without_source:
                (root / "a/model").rename(root / "a/hidden")
            outcome = measure(out, chosen, root, with_source=not without_source)
            seconds = (time.perf_counter() - start) / max(1, len(chosen))
            print(f"{name}: {outcome.share:.1%} of {outcome.total} (of {len(every)}), {seconds:.2f} s each", flush=True)
            print("  " + ", ".join(f"{check} {found}" for check, found in outcome.by_check.most_common()))
            for missed in outcome.missed:
                print(f"  MISSED {missed}")
            for crashed, error in outcome.crashed.items():
                print(f"  CRASHED {crashed}: {error}")
            whole.add(outcome)
    print(f"all: {whole.share:.1%} of {whole.total}")
    if json_file:
        json_file.write_text(json.dumps(vars(whole), indent=1))


if __name__ == "__main__":
    typer.run(main)
