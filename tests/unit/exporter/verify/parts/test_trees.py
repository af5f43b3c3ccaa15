"""What is said of a tree.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from medusa_export.exporter.verify.parts.trees import tree_problems

ENGINES = "which engines are built for"
EMPTY: dict[str, Any] = {"max_draft_len": 0, "medusa_choices": []}
FULL: dict[str, Any] = {"max_draft_len": 2, "medusa_choices": [[0], [0, 0]]}


@pytest.mark.parametrize(
    ("body", "nodes", "found"),
    [
        (FULL, 2, []),
        (FULL, 3, [f"tree.json: 2 choices; config.json has max_draft_len 3, {ENGINES}"]),
        (FULL | {"max_draft_len": 3}, None, ["tree.json: max_draft_len 3, and 2 choices"]),
        (EMPTY, None, ["tree.json: an empty tree"]),
        (EMPTY | {"why": "No tree pays here."}, None, []),
        (EMPTY | {"why": "No tree pays here."}, 2, [f"tree.json: 0 choices; config.json has max_draft_len 2, {ENGINES}"]),
    ],
)  # fmt: skip
def test_what_is_wrong(body: dict[str, Any], nodes: int | None, found: list[str], tmp_path: Path) -> None:
    """A search may have found that no tree pays; a checkpoint of TensorRT-LLM has one in any case."""
    (tmp_path / "tree.json").write_text(json.dumps(body))
    assert tree_problems(tmp_path / "tree.json", heads=3, nodes=nodes) == found
