"""The locked directory beside an output in which a training keeps its checkpoints until the output is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medusa_export.core.artifacts import locking
from medusa_export.core.errors import OutputError

KEPT = "checkpoints are kept, and the same command continues"


@contextmanager
def training_work(output: Path) -> Iterator[Path]:
    """``.{name}.training`` beside the output, as the last run for it left it; whoever publishes the output removes it.

    Raises:
        OutputError: the output exists, another process makes it, or the parent cannot be written.
    """
    require_free(output)
    work = work_beside(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        descriptor = locking.make_locked(work, output)
    except OSError as error:
        got, expected = f"no way to write there ({error.strerror})", "a writable directory"
        raise OutputError(str(output.parent), got, expected, "choose another one") from error
    try:
        yield work
    except (SystemExit, KeyboardInterrupt) as error:
        error.__notes__ = [*getattr(error, "__notes__", ()), KEPT]  # what add_note does since Python 3.11
        raise
    finally:
        if work.is_dir() and not any(work.iterdir()):
            work.rmdir()
        os.close(descriptor)


def require_free(output: Path) -> None:
    """Raise OutputError for an output that exists already."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(str(output), "something in it", "nothing there", "choose another output")


def work_beside(output: Path) -> Path:
    """Where a training for this output keeps its checkpoints."""
    return output.parent / f".{output.name}.training"
