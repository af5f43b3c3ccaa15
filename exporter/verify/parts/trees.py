"""tree.json and acceptance.json, wherever they lie."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medusa_export.core.errors import MedusaExportError
from medusa_export.core.json_fields import read_json
from medusa_export.exporter.verify.findings import own_words
from medusa_export.heads.trees.acceptance import Acceptance, calibration
from medusa_export.heads.trees.tree import PRESETS, Tree, load_tree

WHY = "why"  # a search says it: its answer may be that no tree pays


def tree_problems(path: Path, *, heads: int, top_k: int | None = None, nodes: int | None = None) -> list[str]:
    """What is wrong with a tree.json.

    Args:
        heads: that there are.
        top_k: candidates that a head gives; None: no bound.
        nodes: draft nodes that something was made for; None: any number.
    """
    try:
        tree = load_tree(str(path), num_medusa_heads=heads)
        body = json.loads(path.read_text(encoding="utf-8"))
    except MedusaExportError as error:
        return [f"{path.name}: {own_words(error)}"]
    return [f"{path.name}: {line}" for line in _against(tree, body, top_k, nodes)]


def _against(tree: Tree, body: Any, top_k: int | None, nodes: int | None) -> Iterator[str]:
    if not isinstance(body, dict) or body.get("max_draft_len") != tree.max_draft_len:
        said = body.get("max_draft_len") if isinstance(body, dict) else None
        yield f"max_draft_len {said}, and {tree.max_draft_len} choices"
    elif body.get("medusa_choices") != [list(choice) for choice in tree.choices]:
        yield "its choices are not in breadth-first order"
    if nodes is not None and tree.max_draft_len != nodes:
        yield f"{tree.max_draft_len} choices; config.json has max_draft_len {nodes}, which engines are built for"
    if top_k is not None and tree.max_draft_len and tree.top_k > top_k:
        yield f"it takes the top {tree.top_k} of each head, which gives {top_k}"
    if not tree.max_draft_len and WHY not in body:
        yield "an empty tree"


def expected_tree(arguments: dict[str, Any], default: str, heads: int) -> Tree | None:
    """The tree that an export with these arguments has, where they say it: a preset, or the default one.

    Args:
        arguments: of the manifest.
        default: preset of the engine's kind.
        heads: Medusa heads that there are.
    """
    asked = arguments.get("tree")
    if asked in PRESETS:
        return Tree.from_choices(PRESETS[asked])
    if asked is None and not arguments.get("prompts"):
        return Tree.from_choices(choice for choice in PRESETS[default] if len(choice) <= heads)
    return None


def acceptance_problems(path: Path) -> list[str]:
    """What of an acceptance.json does not follow from the ranks in it."""
    try:
        answers = Acceptance.load(path).answers
        body = read_json(path)
    except MedusaExportError as error:
        return [f"{path.name}: {own_words(error)}"]
    if not answers:
        return []
    again = json.loads(json.dumps(calibration(answers)))
    return [
        f"{path.name}: {key} does not follow from its answers" for key in again if not _same(body.get(key), again[key])
    ]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) or isinstance(other, float):
        return (
            isinstance(one, (int, float))
            and isinstance(other, (int, float))
            and math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)
        )
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
