"""Tensors spread over safetensors files of bounded size, named as save_pretrained does, with their index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

SHARD_BYTES = 5 * 10**9  # what save_pretrained splits at
INDEX = "model.safetensors.index.json"


class Sized(Protocol):
    """What has to be known of a tensor to find its file."""

    @property
    def name(self) -> str: ...

    @property
    def nbytes(self) -> int: ...


_Sized = TypeVar("_Sized", bound=Sized)


def shards(
    entries: Iterable[_Sized], limit: int | None = SHARD_BYTES, file: str = "model.safetensors"
) -> dict[str, list[_Sized]]:
    """File name -> its tensors: files of at most ``limit`` bytes, but for tensors that are larger; ``file`` if one is enough.

    Args:
        entries: tensors in their order.
        limit: bytes of a file; None: no limit.
        file: name of the one file, and stem of several.
    """
    groups: list[list[_Sized]] = [[]]
    size = 0
    for entry in entries:
        if limit is not None and groups[-1] and size + entry.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.nbytes
    if len(groups) == 1:
        return {file: groups[0]}
    stem, _, suffix = file.rpartition(".")
    return {f"{stem}-{number:05}-of-{len(groups):05}.{suffix}": group for number, group in enumerate(groups, start=1)}


def write_index(directory: Path, files: Mapping[str, Sequence[Sized]]) -> None:
    """The index of several files; one file has none."""
    if len(files) > 1:
        total = sum(entry.nbytes for entries in files.values() for entry in entries)
        weight_map = {entry.name: file for file, entries in files.items() for entry in entries}
        body = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
