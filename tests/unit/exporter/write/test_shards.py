"""Tensors spread over files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from medusa_export.exporter.write.shards import INDEX, shards, write_index


@dataclass(frozen=True)
class Tensor:
    name: str
    nbytes: int


SIZES = [Tensor(name, nbytes) for name, nbytes in zip("abcdef", (4, 5, 1, 30, 9, 2), strict=True)]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, ["abcdef"]),
        (51, ["abcdef"]),
        (50, ["abcde", "f"]),
        (10, ["abc", "d", "e", "f"]),
        (11, ["abc", "d", "ef"]),
    ],
)
def test_files_are_filled_in_order(limit: int | None, expected: list[str]) -> None:
    files = shards(SIZES, limit)
    assert ["".join(entry.name for entry in entries) for entries in files.values()] == expected
    count = len(expected)
    names = [f"model-{k:05}-of-{count:05}.safetensors" for k in range(1, count + 1)]
    assert list(files) == (names if count > 1 else ["model.safetensors"])


def test_names_follow_the_file() -> None:
    assert list(shards(SIZES[:2], 4, "heads.v1.bin")) == ["heads.v1-00001-of-00002.bin", "heads.v1-00002-of-00002.bin"]


def test_index(tmp_path: Path) -> None:
    write_index(tmp_path, shards(SIZES))
    assert not list(tmp_path.iterdir())
    write_index(tmp_path, shards(SIZES, 10))
    body = json.loads((tmp_path / INDEX).read_text())
    assert body["metadata"] == {"total_size": 51}
    assert body["weight_map"] == {
        name: f"model-0000{number}-of-00004.safetensors"
        for name, number in zip("abcdef", (1, 1, 1, 2, 3, 4), strict=True)
    }
