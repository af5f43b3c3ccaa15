"""Cost curves: every size and depth measured as often, the cache left as it was, and files read back. No time is asserted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.engines.onnxruntime.batch_engine import TreeBatchDecoder
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine, OnnxRuntimeStep
from medusa_export.engines.tuning import cost
from medusa_export.engines.tuning.cost import (
    SIZES,
    BatchSteps,
    SingleSteps,
    measure_cost,
    timed_trees,
    usual_past_length,
    wide_tree,
    write_costs,
)
from medusa_export.heads.trees.step_costs import cost_curve, load_costs


@pytest.fixture
def engine(tiny_engine: Callable[..., Any]) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(tiny_engine().path)


def test_a_curve(engine: OnnxRuntimeEngine, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    curve = measure_cost(
        SingleSteps(engine), max_nodes=6, past_length=20, rounds=3, progress=lambda *at: seen.append(at)
    )
    assert [row["nodes"] for row in curve["verify"]] == [1, 2, 3, 4, 5, 6]
    assert [row["depth"] for row in curve["draft"]] == [1, 2, 3]
    assert {row["runs"] for row in [*curve["verify"], *curve["draft"]]} == {3 * cost.TIMED}
    assert all(0 < row["ci95"][0] <= row["ms"] <= row["ci95"][1] for row in curve["verify"])
    assert engine.length == 20
    assert seen == [(1, 3), (2, 3), (3, 3)]
    body = write_costs(tmp_path / "cost.json", [curve], engine.info)
    assert body["backend"] == "onnxruntime"
    (read,) = load_costs(tmp_path / "cost.json")
    assert read == curve
    assert cost_curve(read).ratio(1, 0) == 1.0
    assert cost_curve(read).max_nodes == 6


def test_what_a_step_takes_is_what_is_written(engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves with the work: a millisecond a node, a hundredth a head, and one run in which somebody else worked."""
    now = [0.0]
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    verify, draft, calls = OnnxRuntimeStep.verify, engine.draft, [0]

    def slow_verify(step: Any, node_ids: Any) -> Any:
        calls[0] += 1
        now[0] += 1e-3 * len(node_ids) * (50 if calls[0] == 40 else 1)
        return verify(step, node_ids)

    def slow_draft(depth: int) -> Any:
        now[0] += 1e-5 * depth
        return draft(depth)

    monkeypatch.setattr(OnnxRuntimeStep, "verify", slow_verify)
    monkeypatch.setattr(engine, "draft", slow_draft)
    curve = measure_cost(SingleSteps(engine), max_nodes=5, past_length=8, rounds=4)
    assert [row["ms"] for row in curve["verify"]] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [row["ms"] for row in curve["draft"]] == [0.01, 0.02, 0.03]
    assert cost_curve(curve).ratio(4, 2) == pytest.approx(4.02)
    assert sum(row["outliers"] for row in curve["verify"]) <= 1


@pytest.mark.parametrize(
    ("most_tokens", "often"),
    [(20.0, [1, 4, 17, 20]), (16.9, [1, 4]), (1.0, [1, 4]), (float("inf"), [1, 4, 17, 20, 24])],
)
def test_steps_that_cannot_pay_are_timed_less_often(
    most_tokens: float, often: list[int], engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node takes a millisecond, but 17 nodes seem as slow as 40 at first: 20 pay, so 17 do. Small trees are for drafts."""
    now, slow = [0.0], [cost.TRIED * (1 + cost.TIMED)]
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])
    verify = OnnxRuntimeStep.verify

    def slow_verify(step: Any, node_ids: Any) -> Any:
        is_slow = len(node_ids) == 17 and slow[0] > 0
        slow[0] -= is_slow
        now[0] += 1e-3 * (40 if is_slow else len(node_ids))
        return verify(step, node_ids)

    monkeypatch.setattr(OnnxRuntimeStep, "verify", slow_verify)
    options: dict[str, Any] = {"sizes": (1, 4, 17, 20, 24), "past_length": 8, "rounds": 7, "most_tokens": most_tokens}
    rows = measure_cost(SingleSteps(engine), **options)["verify"]
    assert [row["nodes"] for row in rows if row["runs"] == 7 * cost.TIMED] == often
    assert {row["runs"] for row in rows if row["nodes"] not in often} <= {cost.TRIED * cost.TIMED}
    assert [row["ms"] for row in rows if row["nodes"] != 17] == [1.0, 4.0, 20.0, 24.0], (
        "the others' costs are known too"
    )


def test_a_batch(tiny_engine: Callable[..., Any]) -> None:
    path = tiny_engine().path
    decoder, sizes = TreeBatchDecoder(path, slots=3), []
    verify = decoder.verify
    decoder.verify = lambda tree, node_ids: sizes.append(node_ids.shape) or verify(tree, node_ids)  # type: ignore[method-assign, func-returns-value]
    for batch in (3, 2):
        sizes.clear()
        curve = measure_cost(BatchSteps(decoder, batch), max_nodes=4, past_length=20, rounds=1)
        assert (curve["batch"], curve["past_length"]) == (batch, 20)
        assert set(sizes) == {(batch, nodes) for nodes in (1, 2, 3, 4)}
        assert [row["nodes"] for row in curve["verify"]] == [1, 2, 3, 4]
        assert [decoder.remaining(slot) for slot in range(batch)] == [128 - 20] * batch


@pytest.mark.parametrize(
    ("max_length", "past_length", "usual"),
    [(4096, None, 256), (320, None, 160), (128, None, 64), (20, None, 10), (128, 120, 64)],
)
def test_without_flags_any_context_will_do(
    max_length: int, past_length: int | None, usual: int, engine: OnnxRuntimeEngine
) -> None:
    """At the usual past, and as many nodes as fit behind it."""
    info = replace(engine.info, max_length=max_length)
    assert usual_past_length(info) == usual
    past = past_length or usual
    trees = timed_trees(info, past_length=past)
    assert list(trees) == [nodes for nodes in SIZES if nodes <= max_length - past]
    assert all(tree.num_nodes == nodes for nodes, tree in trees.items())


def test_the_usual_past(engine: OnnxRuntimeEngine) -> None:
    assert measure_cost(SingleSteps(engine), sizes=(1, 2), rounds=1)["past_length"] == 64


def test_trees_of_every_size_that_heads_can_fill() -> None:
    assert [wide_tree(nodes, 1, 3) is None for nodes in (1, 4, 5)] == [False, False, True]
    tree = wide_tree(9, 2, 4)
    assert tree is not None
    assert (tree.num_nodes, tree.depth) == (9, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"past_length": 125}, "--past-length"),
        ({"past_length": 0}, "--past-length"),
        ({"rounds": 0}, "--rounds"),
        ({"max_nodes": 0}, "--max-nodes"),
        ({"past_length": 127, "max_nodes": 2}, r"1 \.\. 126, so that 2 nodes fit behind it; lower it or --max-nodes"),
        ({"past_length": 128, "max_nodes": None}, r"1 \.\. 127, so that 1 node fits behind it; choose another"),
    ],
)
def test_refusals(options: dict[str, int | None], message: str, engine: OnnxRuntimeEngine) -> None:
    with pytest.raises(ConfigError, match=message):
        measure_cost(SingleSteps(engine), **{"max_nodes": 4, "past_length": 8, "rounds": 1, **options})
