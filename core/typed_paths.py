"""How an artefact records a path from the command line: two machines that do the same thing write the same bytes."""

from __future__ import annotations

import os
from pathlib import Path


def as_recorded(typed: str | os.PathLike[str]) -> str:
    """A relative path as it was typed, with slashes; of an absolute one, which is one machine's, the last part alone."""
    path = Path(typed)
    return path.name if path.is_absolute() else path.as_posix()
