"""The tree by the number of sequences: measured sizes, what lies between and beyond them, and files without any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.errors import ConfigError, TreeError
from medusa_export.engines.decoding.batch_trees import BatchTrees
from medusa_export.heads.trees.tree import Tree


def written(path: Path, **body: Any) -> Path:
    path.write_text(json.dumps({"medusa_choices": [[0], [1]], **body}))
    return path


def row(batch: int, *choices: list[int], past_length: int = 64) -> dict[str, Any]:
    return {"batch": batch, "past_length": past_length, "medusa_choices": list(choices)}


def test_measured_batches(tmp_path: Path) -> None:
    rows = [row(1, [0], [1], [0, 0]), row(4, [0]), row(16)]
    trees = BatchTrees.load(written(tmp_path / "tree.json", crossover=rows), unmeasured=4)
    sizes = [trees(running).max_draft_len for running in (1, 2, 4, 5, 16, 17)]
    assert sizes == [3, 1, 1, 0, 0, 0]


def test_of_several_lengths_the_first_counts(tmp_path: Path) -> None:
    rows = [row(1, [0]), row(1, [0], [1], past_length=512), row(2, [0], [1])]
    assert BatchTrees.load(written(tmp_path / "tree.json", crossover=rows), unmeasured=4)(1).max_draft_len == 1


@pytest.mark.parametrize("crossover", [[], [row(1, [0])]], ids=["none", "one sequence"])
def test_batches_that_were_not_measured(crossover: list[Any], tmp_path: Path) -> None:
    trees = BatchTrees.load(written(tmp_path / "tree.json", crossover=crossover), unmeasured=4)
    assert trees(4) == Tree.from_choices([[0], [1]])
    assert trees(5).max_draft_len == 0


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(TreeError):
        BatchTrees.load(tmp_path / "absent.json", unmeasured=4)
    with pytest.raises(ConfigError, match="crossover"):
        BatchTrees.load(written(tmp_path / "tree.json", crossover=[{"batch": 1}, {"batch": 2}]), unmeasured=4)
