"""The model and heads that an export was made from: those that its manifest records, or those that the user names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_export.core.artifacts.hashing import sha256_all
from medusa_export.core.errors import MedusaExportError
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint


@dataclass(frozen=True)
class Source:
    """An opened source; ``ckpt`` is its directory."""

    ckpt: Path
    checkpoint: MedusaCheckpoint


def find_source(manifest: Mapping[str, Any] | None, ckpt: Path | None, heads: Path | None) -> Source | str:
    """The source, or why there is none.

    Args:
        manifest: the export's, if it has one.
        ckpt, heads: what the user names; None: what the manifest records, if that is still the same.

    Raises:
        MedusaExportError: a source that the user names and that cannot be opened.
    """
    arguments = (manifest or {}).get("arguments", {})
    if ckpt is not None:
        recorded = arguments.get("heads")
        if heads is None and recorded and Path(recorded).exists():
            heads = Path(recorded)
        return Source(ckpt, MedusaCheckpoint.open(ckpt, heads, check_values=False))
    if not isinstance(arguments.get("ckpt"), str):
        return "no record of it"
    changed = _changed(manifest or {}, [arguments["ckpt"], *([arguments["heads"]] if arguments.get("heads") else [])])
    if changed:
        return changed
    given = heads or (Path(arguments["heads"]) if arguments.get("heads") else None)
    try:
        return Source(
            Path(arguments["ckpt"]), MedusaCheckpoint.open(Path(arguments["ckpt"]), given, check_values=False)
        )
    except MedusaExportError as error:
        return str(error)


def _changed(manifest: Mapping[str, Any], places: list[str]) -> str:
    """The first recorded input that is gone or another one; empty: all are as they were."""
    inputs = {Path(name): digest for name, digest in manifest["inputs"].items()}
    mine = [path for path in inputs if any(path == Path(place) or Path(place) in path.parents for place in places)]
    missing = [path for path in mine if not path.is_file()]
    if missing or not mine:
        return f"{missing[0] if missing else places[0]} is not there any more"
    for path, digest in zip(mine, sha256_all(mine), strict=True):
        if digest != inputs[path]:
            return f"{path} is not what was exported"
    return ""
