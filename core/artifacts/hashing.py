"""SHA-256 of files, several at a time: hashlib lets go of the interpreter while it computes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from medusa_export.core.errors import OutputError
from medusa_export.core.threads import StopPoint, cpus, run_all

WORKERS = min(4, cpus())  # more would wait for the disk

CHUNK_BYTES = 4 << 20


class FileEntry(TypedDict):
    """What is recorded of a written file: bytes, and hexadecimal SHA-256."""

    size: int
    sha256: str


@dataclass(frozen=True)
class WrittenFile:
    """A file whose bytes were hashed on their way to the disk."""

    size: int
    sha256: str


def sha256(path: Path, stop_point: StopPoint = lambda: None) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces; ``stop_point`` is called before each."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            stop_point()
            digest.update(buffer[:count])
    return digest.hexdigest()


def sha256_all(paths: Iterable[Path]) -> list[str]:
    """Hexadecimal SHA-256 of every file, in the order of the paths.

    Raises:
        OSError: a file cannot be read.
    """
    return run_all(sha256, paths, workers=WORKERS)


def describe(files: Mapping[str, Path]) -> dict[str, FileEntry]:
    """Size and SHA-256 of every file, under the names given.

    Raises:
        OutputError: a link.
    """
    if links := [name for name, path in files.items() if path.is_symlink()]:
        raise OutputError(links[0], "a link", "files that do not depend on other directories", "copy it instead")
    hashes = sha256_all(files.values())
    return {
        name: {"size": path.stat().st_size, "sha256": digest}
        for (name, path), digest in zip(files.items(), hashes, strict=True)
    }


def list_files(path: Path, root: Path) -> dict[str, Path]:
    """Name relative to ``root`` -> path of every file and link at or below ``path``, sorted."""
    below = sorted(path.rglob("*")) if path.is_dir() and not path.is_symlink() else [path]
    found = (item for item in below if item.is_symlink() or (item.exists() and not item.is_dir()))
    return {item.relative_to(root).as_posix(): item for item in found}
