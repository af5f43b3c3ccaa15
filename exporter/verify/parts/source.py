"""The model and heads that an export was made from: those that its manifest records, or those that the user names."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_export.core.artifacts.hashing import sha256_all
from medusa_export.core.errors import MedusaExportError
from medusa_export.core.hub import cached_snapshot
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint


@dataclass(frozen=True)
class Source:
    """An opened source; ``ckpt`` is its directory."""

    ckpt: Path
    checkpoint: MedusaCheckpoint


def find_source(
    manifest: Mapping[str, Any] | None, ckpt: Path | None, heads: Path | None, *, out: Path | None = None
) -> Source | str:
    """The source, or why there is none.

    Args:
        manifest: the export's, if it has one.
        ckpt, heads: what the user names; None: what the manifest records, if that is still the same.
        out: the export; what it records is looked for in the working directory, beside it, and in the hub's cache.

    Raises:
        MedusaExportError: a source that the user names and that cannot be opened.
    """
    recorded = {name: _place(manifest or {}, name, out) for name in ("ckpt", "heads")}
    heads = heads or recorded["heads"]
    if ckpt is not None:
        return Source(ckpt, MedusaCheckpoint.open(ckpt, heads, check_values=False))
    arguments = (manifest or {}).get("arguments", {})
    if not isinstance(arguments.get("ckpt"), str):
        return "no record of it"
    missing = [arguments[name] for name, place in recorded.items() if arguments.get(name) and place is None]
    if missing or recorded["ckpt"] is None:
        return f"{missing[0]} is not there any more (looked for {', '.join(map(str, _looked(manifest or {}, out)))})"
    if changed := _changed(manifest or {}, recorded):
        return changed
    try:
        return Source(recorded["ckpt"], MedusaCheckpoint.open(recorded["ckpt"], heads, check_values=False))
    except MedusaExportError as error:
        return str(error)


def _place(manifest: Mapping[str, Any], name: str, out: Path | None) -> Path | None:
    """Where a recorded model, or heads, may lie on this machine; what is there need not be the same."""
    given, commit = manifest.get("arguments", {}).get(name), manifest.get("sources", {}).get(name, {}).get("commit")
    if not isinstance(given, str):
        return None
    if commit is not None:
        return cached_snapshot(manifest["sources"][name]["name"], commit)
    files = [file.partition("/")[2] for file in manifest.get("inputs", {}) if file.startswith(f"{name}/")]
    present = [place for place in _places(manifest, name, out) if place.exists()]
    whole = (place for place in present if place.is_file() or all((place / file).is_file() for file in files))
    return next(whole, present[0] if present else None)


def _places(manifest: Mapping[str, Any], name: str, out: Path | None) -> list[Path]:
    """Where to look: at what was typed, which for an absolute path the command alone says, here, and beside the export."""
    given = Path(manifest["arguments"][name])
    beside = [] if out is None else [out.resolve().parent / given, out.resolve().parent / given.name]
    return list(dict.fromkeys([*_typed(str(manifest.get("command", "")), f"--{name}"), given, *beside]))


def _typed(command: str, option: str) -> list[Path]:
    """The value of an option in a command line."""
    try:
        words = shlex.split(command)
    except ValueError:  # somebody changed it: it is a record, and nothing depends on it
        return []
    joined = [word.removeprefix(f"{option}=") for word in words if word.startswith(f"{option}=")]
    apart = [value for word, value in itertools.pairwise(words) if word == option]
    return [Path(value) for value in joined + apart]


def _looked(manifest: Mapping[str, Any], out: Path | None) -> list[str]:
    """The first thing that is not there: every place where it was looked for."""
    for name in ("ckpt", "heads"):
        source = manifest.get("sources", {}).get(name, {})
        if isinstance(manifest["arguments"].get(name), str) and _place(manifest, name, out) is None:
            if "commit" in source:
                return [f"commit {source['commit'][:12]} in the Hugging Face cache"]
            return [str(place) for place in _places(manifest, name, out)]
    return []


def _changed(manifest: Mapping[str, Any], places: Mapping[str, Path | None]) -> str:
    """The first recorded input that is gone or another one; empty: all are as they were."""
    inputs: dict[Path, str] = {}
    for name, digest in manifest["inputs"].items():
        role, _, file = name.partition("/")
        place = places.get(role)
        if place is not None:
            inputs[(place.parent if place.is_file() else place) / file] = digest
    missing = [path for path in inputs if not path.is_file()]
    if missing or not inputs:
        return f"{missing[0] if missing else places['ckpt']} is not there any more"
    for (path, digest), found in zip(inputs.items(), sha256_all(inputs), strict=True):
        if digest != found:
            return f"{path} is not what was exported"
    return ""
