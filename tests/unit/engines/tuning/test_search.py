"""The search end to end on counted answers and given costs, its sentence and its file, and trees that are run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.engines.decoding.single_slot import OneSequence
from medusa_export.engines.measure import side_by_side as confirm_module
from medusa_export.engines.measure.side_by_side import Measured, compare
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.engines.tuning.acceptance import measure_acceptance
from medusa_export.engines.tuning.picture import draw, positions
from medusa_export.engines.tuning.search import Search, confirm, search, sentence, tree_json
from medusa_export.heads.trees.acceptance import Acceptance, Answer
from medusa_export.heads.trees.search import CostCurve
from medusa_export.heads.trees.tree import Tree, load_tree

FLAT = CostCurve({1: 10.0, 64: 10.0})
STEEP = CostCurve({1: 10.0, 2: 20.0, 64: 640.0})


@pytest.fixture
def counted() -> Acceptance:
    """Three prompts on which the first head is right half of the time, and the second one after it."""
    chance = np.random.default_rng(0)
    ranks = [
        np.stack([chance.choice([0, 1, 10], 50, p=[0.5, 0.2, 0.3]), chance.choice([0, 3], 50)], axis=1)
        for _ in range(3)
    ]
    for table in ranks:
        table[-1], table[-2, 1] = -1, -1
    return Acceptance.from_answers([Answer(str(n), "c", table) for n, table in enumerate(ranks)])


def tokens_per_step(counted: Acceptance, tree: Tree) -> float:
    found = counted.walk(tree)
    assert found is not None
    return found[0]


def test_a_tree_that_pays(counted: Acceptance, tmp_path: Path) -> None:
    found = search(counted, FLAT)
    assert found.chosen.speedup == max(item.speedup for item in found.sizes)
    assert found.chosen.tokens_per_step == tokens_per_step(counted, found.chosen.tree)
    assert found.interval is not None
    assert found.interval[0] < found.chosen.speedup < found.interval[1]
    text = sentence(found)
    assert f"{found.chosen.tree.max_draft_len} draft tokens, 2 deep" in text
    assert f"predicted {found.chosen.speedup:.2f}x" in text
    path = tmp_path / "tree.json"
    path.write_text(tree_json(found))
    assert load_tree(str(path)) == found.chosen.tree
    body = json.loads(path.read_text())
    assert body["why"] == text
    assert body["triton_medusa_choices"] == found.chosen.tree.to_triton()
    assert [row["max_draft_len"] for row in body["sizes"]] == list(range(len(found.sizes)))


def test_no_tree_where_nodes_cost_too_much(counted: Acceptance) -> None:
    found = search(counted, STEEP)
    assert found.chosen.tree == Tree(())
    assert found.runner_up.tree.max_draft_len == 1
    assert sentence(found).startswith("No tree pays here")
    assert f"{found.runner_up.speedup:.2f}x" in sentence(found)


def test_heads_that_cost_keep_the_tree_shallow(counted: Acceptance) -> None:
    assert search(counted, CostCurve({1: 10.0, 64: 10.0}, {1: 0.1, 2: 8.0})).chosen.tree.depth == 1
    assert search(counted, CostCurve({1: 10.0, 64: 10.0}, {1: 0.1, 2: 0.2})).chosen.tree.depth == 2


def test_limits(counted: Acceptance) -> None:
    assert search(counted, FLAT, max_draft_len=2).chosen.tree.max_draft_len == 2
    assert {item.tree.num_nodes for item in search(counted, FLAT, sizes=(1, 4)).sizes} == {1, 4}


def test_what_runs_fastest_is_taken(counted: Acceptance, monkeypatch: pytest.MonkeyPatch) -> None:
    predicted = search(counted, FLAT)

    def run(speeds: list[float]) -> Any:
        def fake(_engine: Any, trees: list[Tree], _prompts: Any, **_: Any) -> list[Measured[Tree]]:
            return [
                Measured(tree, speed, (speed - 0.1, speed + 0.1), 1.5)
                for tree, speed in zip(trees, speeds, strict=True)
            ]

        monkeypatch.setattr("medusa_export.engines.tuning.search.compare", fake)
        return confirm(predicted, counted, None, [[1]], max_new_tokens=4)  # type: ignore[arg-type]

    order = sorted(predicted.sizes[1:], key=lambda item: -item.speedup)
    found = run([1.1, 1.3, 1.2])
    assert found.chosen == order[1]
    assert found.measurement is not None
    assert "measured 1.30x (1.20 .. 1.40)" in sentence(found)
    assert json.loads(tree_json(found))["measured"][1]["speedup"] == 1.3
    assert run([0.9, 0.8, 0.7]).chosen.tree == Tree(())
    assert "measured 0.90x" in sentence(run([0.9, 0.8, 0.7]))


def ran(found: Search, speeds: dict[int, float | None]) -> Search:
    """A search whose trees of so many draft tokens were run."""
    trees = {item.tree.max_draft_len: item.tree for item in found.sizes}
    rows = (
        Measured(trees[size], speed, (speed - 0.01, speed + 0.01) if speed else None, speed)
        for size, speed in speeds.items()
    )
    return replace(found, measured=tuple(rows))


def test_a_tree_s_own_measurement_is_quoted(counted: Acceptance) -> None:
    """The best of those that were run: its prediction and its measurement, not another tree's of either."""
    none = search(counted, STEEP)
    found = ran(none, {1: 0.80, 2: 0.97, 3: 0.9})
    best = next(item for item in none.sizes if item.tree.max_draft_len == 2)
    assert none.runner_up.tree.max_draft_len == 1  # by prediction
    assert f"the best one, 2 draft tokens, {best.tree.depth} deep, is predicted" in sentence(found)
    assert f"{best.speedup:.2f}x, measured 0.97x (0.96 .. 0.98)." in sentence(found)
    assert "the best one, 1 draft token, 1 deep, is predicted" in sentence(ran(none, {1: 0.80}))
    assert "measured 0.80x" in sentence(ran(none, {1: 0.80}))


def test_what_was_run_and_not_measured(counted: Acceptance, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every answer has one token: the prediction stands, and no number is made up."""
    predicted = search(counted, FLAT)
    monkeypatch.setattr(
        "medusa_export.engines.tuning.search.compare",
        lambda _engine, trees, _prompts, **_: [Measured(tree, None, None, None) for tree in trees],
    )
    found = confirm(predicted, counted, None, [[1]], max_new_tokens=4)  # type: ignore[arg-type]
    assert found.chosen == predicted.chosen
    assert len(found.measured) == 3
    assert sentence(found).endswith(", not measured: every answer has one token.")
    rows = json.loads(tree_json(found))["measured"]
    assert {(row["speedup"], row["speedup_ci95"], row["tokens_per_step"]) for row in rows} == {(None, None, None)}
    draw(tmp_path / "t.svg", found, counted)


def test_a_picture_of_few_prompts(counted: Acceptance, tmp_path: Path) -> None:
    """Trees that were measured without an interval, with one, and not at all."""
    found = search(counted, FLAT)
    (first, second, third, *_) = found.sizes[1:]
    rows = (
        Measured(first.tree, 1.1, None, 1.5),
        Measured(second.tree, 1.2, (1.1, 1.4), 1.5),
        Measured(third.tree, None, None, None),
    )
    draw(tmp_path / "t.svg", replace(found, measured=rows), counted)
    assert "<!-- measured -->" in (tmp_path / "t.svg").read_text()


def test_where_the_costs_are_of(counted: Acceptance) -> None:
    for times, start in (
        ({64: 10.0}, "At batch 4 with 512 tokens in the cache, the tree of"),
        (
            {2: 99.0},
            "No tree pays here, at batch 4 with 512 tokens in the cache: the best one, 1 draft token, 1 deep, is",
        ),
    ):
        cost = CostCurve({1: 10.0, **times}, batch=4, past_length=512)
        assert sentence(search(counted, cost)).startswith(start)
    assert sentence(search(counted, FLAT)).startswith("At batch 1, the tree of")
    assert "the tree of 1 draft token, 1 deep, yields" in sentence(search(counted, FLAT, max_draft_len=1))


def test_sizes_of_which_there_is_no_tree(counted: Acceptance) -> None:
    largest = search(counted, FLAT).sizes[-1].tree.num_nodes
    with pytest.raises(
        ConfigError,
        match=rf"--nodes: got 100, 200: no tree of so many nodes was timed and counted; expected 2 \.\. {largest};",
    ):
        search(counted, FLAT, sizes=(100, 200))
    assert len(search(counted, FLAT, sizes=(3, 100)).sizes) == 2


def test_nothing_to_choose_from(counted: Acceptance) -> None:
    for acceptance, cost in ((Acceptance(100, {}), FLAT), (counted, CostCurve({1: 10.0}))):
        found = search(acceptance, cost)
        assert found.chosen.tree == Tree(())
        assert sentence(found) == (
            "No tree pays here, at batch 1: no draft was ever right, or no step with drafts was timed."
        )


def test_trees_are_compared_on_the_same_tokens(
    tiny_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that a step without a tree moves by one and a step with a tree by two: the ratio is known."""
    engine = OnnxRuntimeEngine(tiny_engine(drafts_well=True).path)
    generate = confirm_module.generate

    def timed(engine: Any, input_ids: list[int], tree: Tree, **options: Any) -> Any:
        result = generate(engine, input_ids, tree, **options)
        result.decode_ms = len(result.accepted) * (2.0 if tree.max_draft_len else 1.0)
        return result

    monkeypatch.setattr(confirm_module, "generate", timed)
    trees, prompts = [Tree.from_choices([[0]]), Tree.from_choices([[0], [0, 0]])], [[5, 9], [7, 3, 4]]
    short, deep = compare(engine, trees, prompts, max_new_tokens=20, repeats=2)
    assert short.speedup == pytest.approx(short.tokens_per_step / 2)
    assert deep.tokens_per_step > short.tokens_per_step > 1
    counted = Acceptance.from_answers(
        measure_acceptance(OneSequence(engine), [("a", "b", ids) for ids in prompts], max_new_tokens=20)
    )
    assert deep.tokens_per_step == pytest.approx(tokens_per_step(counted, trees[1]))


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_a_picture(suffix: str, counted: Acceptance, tmp_path: Path) -> None:
    found, path = search(counted, FLAT), tmp_path / f"tree{suffix}"
    draw(path, found, counted)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    if suffix == ".svg":
        assert re.search(r"<!-- \d+% -->", data.decode())


def test_parents_stand_above_the_middle_of_their_children() -> None:
    tree = Tree.from_choices([[0], [1], [0, 0], [0, 1], [0, 2], [1, 0]])
    places = positions(tree)
    assert places[(0,)][0] == (places[(0, 0)][0] + places[(0, 2)][0]) / 2
    assert len({places[choice] for choice in places}) == 7
    leaves = [places[choice][0] for choice in [(0, 0), (0, 1), (0, 2), (1, 0)]]
    assert leaves == sorted(leaves)
