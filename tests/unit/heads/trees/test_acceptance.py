"""Accuracies, paths, trees, tokens per step and intervals on numbers that can be counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.heads.trees.acceptance import (
    ABSENT,
    Acceptance,
    Answer,
    accuracies,
    best_tree,
    calibration,
    mean_accuracy,
    path_counts,
    tokens_per_step,
    write_calibration,
)
from medusa_export.heads.trees.tree import Tree

RANKS = np.array([[0, 0], [1, 3], [0, ABSENT], [ABSENT, 0], [0, -1], [-1, -1]])
ANSWERS = np.zeros(6, dtype=np.int64)


def test_accuracies_leave_out_what_has_no_label() -> None:
    first, second = accuracies(RANKS)
    assert (first["top1"], first["top2"]) == (3 / 5, 4 / 5)
    assert (second["top1"], second["top4"]) == (2 / 4, 3 / 4)


def test_tokens_per_step_walks_as_an_engine_does() -> None:
    """Row 0 accepts two drafts (3 tokens, on to row 3), row 3 none (to row 4), row 4 one, of which the answer has room for 1."""
    assert tokens_per_step(Tree.from_choices([[0], [0, 0]]), RANKS, ANSWERS) == pytest.approx(5 / 3)
    assert tokens_per_step(Tree(()), RANKS, ANSWERS) == 1.0
    assert tokens_per_step(Tree.from_choices([[1]]), RANKS, ANSWERS) == pytest.approx(5 / 4)


def test_the_tree_grows_where_true_paths_go_on() -> None:
    assert path_counts(RANKS) == {(0,): 3, (0, 0): 1, (1,): 1, (1, 3): 1}
    assert set(best_tree(RANKS, 2).choices) == {(0,), (1,)}
    assert set(best_tree(RANKS, 9).choices) == set(path_counts(RANKS))


def test_answers_do_not_run_into_each_other() -> None:
    tree = Tree.from_choices([[0], [0, 0]])
    ranks = np.array([[0, 0], [0, 0], [-1, -1], [0, 0], [-1, -1]])
    assert tokens_per_step(tree, ranks, np.array([0, 0, 0, 1, 1])) == pytest.approx((2 + 1) / 2)
    assert tokens_per_step(tree, ranks[:1], np.array([0])) == 1.0  # no step at all


def test_mean_accuracy_weighs_the_first_head_most() -> None:
    assert mean_accuracy([{"top1": 0.5}, {"top1": 0.1}]) == pytest.approx((0.5 + 0.8 * 0.1) / 1.8)


def answers() -> list[Answer]:
    return [Answer("a", "math", RANKS[:4]), Answer("b", "talk", RANKS[3:]), Answer("c", "talk", RANKS)]


def test_a_calibration_is_read_back_and_walked(tmp_path: Path) -> None:
    path = tmp_path / "acceptance.json"
    body = write_calibration(path, answers(), {"engine": "e"})
    assert json.loads(path.read_text()) == body
    found, counted = Acceptance.load(path), Acceptance.from_answers(answers())
    assert found.positions == counted.positions == body["positions"] == 4 + 2 + 5
    assert found.paths == counted.paths == {(0,): 2 + 1 + 3, (0, 0): 1 + 0 + 1, (1,): 2, (1, 3): 2}
    tree = Tree.from_choices([[0], [0, 0]])
    tokens, (low, high) = found.walk(tree) or pytest.fail("there are answers")
    assert tokens == pytest.approx((3 + 2 + 5) / (1 + 2 + 3))
    assert low < tokens < high
    (first, second), (math, talk) = body["heads"], body["categories"]
    assert first["top1_ci95"][0] <= first["top1"] <= first["top1_ci95"][1]
    assert second["top1"] == pytest.approx((2 + 1 + 2) / (4 + 1 + 4))
    assert (math["prompts"], talk["prompts"], talk["positions"]) == (1, 2, 7)
    assert talk["top1"][0] == pytest.approx((1 + 3) / 7)


def test_a_training_s_file_has_no_answers(tmp_path: Path) -> None:
    body = {name: value for name, value in calibration(answers()).items() if name in ("positions", "paths", "heads")}
    (tmp_path / "a.json").write_text(json.dumps(body))
    found = Acceptance.load(tmp_path / "a.json")
    assert found.paths == Acceptance.from_answers(answers()).paths
    assert found.walk(Tree(())) is None


@pytest.mark.parametrize(
    "body", [{}, {"positions": 1}, {"positions": 1, "paths": [{"choice": 3}]}, {"positions": "x", "paths": []}]
)
def test_no_such_file(body: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(body))
    with pytest.raises(ConfigError, match="calibrate again"):
        Acceptance.load(tmp_path / "a.json")


SEEN = {"positions": 4, "paths": [{"choice": [0], "count": 3}]}
RANKED = {"prompt": "a", "category": "c", "ranks": [[0, 1], [-1, -1]], "lookup": [1, 0]}


@pytest.mark.parametrize(
    ("change", "got"),
    [
        ({"positions": 0}, "0 positions"),
        ({"positions": 0, "paths": []}, "0 positions"),
        ({"positions": 2}, "a path seen 3 times at 2 positions"),
        ({"positions": -1}, "positions -1"),
        ({"positions": 1e400}, "positions inf"),
        ({"paths": [{"choice": [], "count": 1}]}, "the choice []"),
        ({"paths": [{"choice": [-1], "count": 1}]}, "the choice [-1]"),
        ({"paths": [{"choice": [16], "count": 1}]}, "the choice [16]"),
        ({"paths": [{"choice": [0.5], "count": 1}]}, "the choice [0.5]"),
        ({"paths": [{"choice": [0] * 17, "count": 1}]}, "the choice [0, 0"),
        ({"paths": [{"choice": [0], "count": -1}]}, "count -1"),
        ({"answers": [RANKED | {"ranks": [0, 1]}]}, "ranks that are no row a token"),
        ({"answers": [RANKED | {"ranks": []}]}, "ranks that are no row a token"),
        ({"answers": [RANKED | {"ranks": [[10**30]]}]}, "a value of another kind"),
        ({"answers": [RANKED | {"lookup": [1]}]}, "lookup that is no count a token"),
        ({"answers": [RANKED | {"lookup": [-1, 0]}]}, "lookup that is no count a token"),
        ({"answers": [RANKED, RANKED | {"ranks": [[0], [-1]]}]}, "answers of different numbers of heads"),
    ],
    ids=lambda value: str(value)[-60:],
)
def test_counts_that_cannot_be(change: dict[str, Any], got: str, tmp_path: Path) -> None:
    """A negative count of prompt lookup would never let its walk end."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps(SEEN | {"answers": [RANKED]}))
    assert Acceptance.load(path).lookup() is not None
    path.write_text(json.dumps(SEEN | change))
    with pytest.raises(ConfigError, match="calibrate again") as raised:
        Acceptance.load(path)
    assert raised.value.where == str(path)
    assert raised.value.got.startswith(got)
