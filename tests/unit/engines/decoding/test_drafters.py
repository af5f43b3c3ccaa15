"""Whoever drafts, the text is the one without drafts; and drafts are chosen by what pays."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_export.core.errors import ConfigError, TreeError
from medusa_export.engines.decoding.batch_trees import BatchTrees
from medusa_export.engines.decoding.draft_flags import AUTO, DRAFTS_CHOICES
from medusa_export.engines.decoding.draft_kinds import DRAFTS, Engine, open_drafter, require_drafts, settle_drafts
from medusa_export.engines.decoding.drafters import CHAINS, PayingDrafter, TreeDrafter
from medusa_export.engines.decoding.generate import generate
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.engines.tensorrt.emulation.onnx_device import OnnxDevice
from medusa_export.engines.tensorrt.engine import TensorRtEngine
from medusa_export.heads.decoding.accept import Typical
from medusa_export.heads.decoding.sampling import Sampler
from medusa_export.heads.trees.followers import FOLLOWERS_FILE, Followers
from medusa_export.heads.trees.step_costs import StepCosts
from medusa_export.heads.trees.tree import Tree

TREE = Tree.from_choices([[0], [1], [0, 0]])
PROMPT = [3, 4, 5, 6, 9, 3, 4, 5, 6, 9, 3, 4]
PATHS = {(0,): 0.5, (1,): 0.2, (0, 0): 0.15}


def costs(second: float, later: float = 0.1, **past: float) -> StepCosts:
    """A step of one node is 1; a second one costs ``second`` more, further ones ``later`` each."""
    rows = [{"nodes": n, "ms": 1 + (n > 1) * second + max(0, n - 2) * later} for n in (1, 2, 40)]
    return StepCosts([{"batch": 1, "past_length": 10, "verify": rows, "draft": []}])


class Heads:
    """Heads that always draft the same."""

    def __init__(self, active: int = 1) -> None:
        self.active = active
        self.asked: list[int] = []

    def draft(self, depth: int) -> Any:
        self.asked.append(depth)
        return np.tile(np.array([[[50, 51, 52]] * depth]), (self.active, 1, 1))


def repeating(engine: Any) -> list[int]:
    """A prompt whose answer stands in it already: the tiny model goes the same way from the same token."""
    start = PROMPT[0]
    return [start, *generate(engine, [start], AUTOREGRESSIVE, max_new_tokens=30, eos_token_ids=()).tokens, start]


def drawn(temperature: float) -> Sampler | None:
    return Sampler(temperature, 5) if temperature else None


@pytest.mark.parametrize("drafts", ["heads", "text", "both"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_the_text_is_the_one_without_drafts(
    drafts: str, temperature: float, backend: str, tiny_engine: Callable[..., Any], portable: Callable[..., Any]
) -> None:
    if backend == "tensorrt":
        made = portable()
        path, engine = made.engine_dir, TensorRtEngine(made.engine_dir, OnnxDevice(made.onnx_dir))
    else:
        path = tiny_engine(drafts_well=True).path
        engine = OnnxRuntimeEngine(path)
    drafter = open_drafter(drafts, Engine(path, engine.info, BatchTrees({1: TREE}), engine.max_nodes))
    options: dict[str, Any] = {"max_new_tokens": 24, "eos_token_ids": ()}
    prompt = repeating(engine)
    expected = generate(engine, prompt, AUTOREGRESSIVE, sampler=drawn(temperature), **options)
    found = generate(engine, prompt, drafter, sampler=drawn(temperature), **options)
    assert found.tokens == expected.tokens
    assert len(expected.tokens) == 24
    again = generate(engine, prompt, drafter, sampler=drawn(temperature), **options)
    assert again.accepted == found.accepted, "a request takes the same steps again"
    assert max(found.accepted) > 1, "drafts of which nothing is accepted test little"


@pytest.mark.parametrize("drafts", ["text", "both"])
def test_typical_acceptance_takes_any_drafts(drafts: str, tiny_engine: Callable[..., Any]) -> None:
    path = tiny_engine(drafts_well=True).path
    engine = OnnxRuntimeEngine(path)
    drafter = open_drafter(drafts, Engine(path, engine.info, BatchTrees({1: TREE}), engine.max_nodes))
    result = generate(
        engine, repeating(engine), drafter, max_new_tokens=30, eos_token_ids=(), sampler=Sampler(0.9, 5),
        typical=Typical(threshold=0.0001, alpha=0.0001),
    )  # fmt: skip
    assert (len(result.tokens), max(result.accepted) > 1) == (30, True), "nearly every draft is likely enough"


class TestWhatPays:
    def shape(self, drafter: PayingDrafter, texts: Sequence[list[int]], heads: Heads, remaining: int = 99) -> Tree:
        tree, node_ids = drafter.draft(heads, [drafter.begin(text) for text in texts], remaining)  # type: ignore[arg-type]
        assert node_ids.shape == (len(texts), tree.num_nodes)
        assert node_ids[:, 0].tolist() == [text[-1] for text in texts]
        return tree

    def test_a_match_that_is_worth_its_rows(self) -> None:
        heads, drafter = Heads(), PayingDrafter({}, costs(0.2), 64)
        assert self.shape(drafter, [PROMPT], heads).num_nodes > 1
        assert self.shape(drafter, [[1, 2, 3, 4, 5, 6]], heads).num_nodes == 1
        assert not heads.asked

    def test_dear_rows_are_left_alone(self) -> None:
        """A match of four is right in four of five times: worth a row at a half more, and no row at all at three times."""
        assert self.shape(PayingDrafter({}, costs(0.5), 64), [PROMPT], Heads()).num_nodes > 1
        assert self.shape(PayingDrafter(PATHS, costs(9.0), 64), [PROMPT], Heads()).num_nodes == 1

    def test_heads_where_there_is_no_match(self) -> None:
        heads = Heads()
        assert self.shape(PayingDrafter(PATHS, costs(0.1, 0.01), 64), [[1, 2, 3, 4, 5]], heads).num_nodes == 4
        assert heads.asked == [2]

    def test_cheap_rows_take_both(self) -> None:
        heads = Heads()
        tree = self.shape(PayingDrafter(PATHS, costs(0.01, 0.0001), 64), [PROMPT], heads)
        assert (tree.num_nodes, heads.asked) == (1 + 3 + max(CHAINS), [2])

    def test_ranks_with_gaps(self) -> None:
        """What was counted on few prompts may favour any ranks."""
        drafter = PayingDrafter({(0,): 0.5, (2,): 0.2}, costs(0.01, 0.0001), 64)
        sequence = drafter.begin(PROMPT)
        tree, (row,) = drafter.draft(Heads(), [sequence], 99)  # type: ignore[arg-type]
        assert tree.num_nodes == 1 + 2 + max(CHAINS)
        assert {50, 52} <= set(row.tolist())
        assert sequence.candidates == [50, 52]

    def test_what_often_follows_the_newest_token_is_drafted_first(self) -> None:
        texts = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]]
        followers = Followers.count([([5, 52, 5, 52, 50], [True] * 5)], 64)
        drafter = PayingDrafter({(0,): 0.6}, costs(0.1, 0.01), 64, followers)
        sequences = [drafter.begin(text) for text in texts]
        _, rows = drafter.draft(Heads(2), sequences, 99)  # type: ignore[arg-type]
        assert rows.tolist() == [[5, 52], [6, 50]]
        assert [sequence.candidates for sequence in sequences] == [[52], [50]]

    def test_room(self) -> None:
        drafter = PayingDrafter(PATHS, costs(0.01, 0.0001), 64)
        for remaining in (1, 4, 5, 9):
            assert self.shape(drafter, [PROMPT], Heads(), remaining).num_nodes <= remaining
        assert max(tree.num_nodes for tree in PayingDrafter(PATHS, costs(0.1), 8).trees) <= 8

    def test_many_share_a_shape_and_have_their_own_drafts(self) -> None:
        drafter = PayingDrafter({}, costs(0.01, 0.0001), 64)
        texts = [PROMPT, [1, 2, 3, 8, 7, 1, 2, 3], [40, 41, 42]]
        _, rows = drafter.draft(Heads(3), [drafter.begin(text) for text in texts], 99)  # type: ignore[arg-type]
        assert rows[0, 1:4].tolist() == [5, 6, 9]
        assert rows[1, 1:4].tolist() == [8, 7, 1]
        assert set(rows[2].tolist()) == {42}

    def test_drafts_that_never_come_true_stop(self) -> None:
        """A text in which the same words are followed by others each time."""
        drafter, sizes = PayingDrafter({}, costs(0.3), 64), []
        sequence = drafter.begin([1, 2, 3, 4, 50, 1, 2, 3, 4])
        for step in range(30):
            tree, _ = drafter.draft(Heads(), [sequence], 99)  # type: ignore[arg-type]
            sizes.append(tree.num_nodes)
            sequence.extend([60 + step])
            sequence.extend([1, 2, 3, 4])
        assert sizes[0] > 1
        assert set(sizes[-5:]) == {1}


def test_costs_by_length_and_batch() -> None:
    curve = {"verify": [{"nodes": 1, "ms": 10.0}, {"nodes": 4, "ms": 16.0}], "draft": [{"depth": 1, "ms": 1.0}]}
    dear = {"verify": [{"nodes": 1, "ms": 12.0}, {"nodes": 4, "ms": 30.0}], "draft": [{"depth": 1, "ms": 1.0}]}
    found = StepCosts([{"batch": 1, "past_length": 100, **curve}, {"batch": 1, "past_length": 300, **dear}])
    assert found.ms(1, 0, 100) == 10.0
    assert found.ms(2, 1, 100) == 13.0
    assert found.ms(4, 0, 200) == 23.0, "between two lengths"
    assert found.ms(4, 0, 9999) == 30.0, "beyond the longest, as there"
    assert found.ms(2, 0, 100, batch=2) == 16.0, "of a batch that nobody measured: as many rows"
    assert found.ms(4, 0, 100, batch=2) == 32.0
    batched = StepCosts([*found.curves, {"batch": 8, "past_length": 100, **dear}])
    assert batched.ms(4, 0, 100, batch=3) == 30.0, "the next larger batch that was measured"


def test_costs_of_the_engine_decide(tiny_engine: Callable[..., Any]) -> None:
    """cost.json and acceptance.json of its directory, where there are any."""
    path: Path = tiny_engine(drafts_well=True).path
    engine = OnnxRuntimeEngine(path)
    target = Engine(path, engine.info, BatchTrees({1: TREE}), engine.max_nodes)
    options: dict[str, Any] = {"max_new_tokens": 30, "eos_token_ids": ()}
    assert max(generate(engine, PROMPT, open_drafter("both", target), **options).accepted) > 1
    rows = [{"nodes": 1, "ms": 1.0}, {"nodes": 2, "ms": 50.0}, {"nodes": 16, "ms": 60.0}]
    (path / "cost.json").write_text(json.dumps({"curves": [{"verify": rows}]}))
    assert max(generate(engine, PROMPT, open_drafter("both", target), **options).accepted) == 1


def test_followers_of_the_engine_are_read(tiny_engine: Callable[..., Any]) -> None:
    """A table that has every token follow every other one alike changes nothing; one of another model is refused."""
    path: Path = tiny_engine(drafts_well=True).path
    engine = OnnxRuntimeEngine(path)
    target = Engine(path, engine.info, BatchTrees({1: TREE}), engine.max_nodes)
    options: dict[str, Any] = {"max_new_tokens": 30, "eos_token_ids": ()}
    plain = generate(engine, PROMPT, open_drafter("both", target), **options)
    wrong = [(pair, [True, True]) for pair in zip(plain.tokens, plain.tokens[2:], strict=False)]
    for texts in ([], wrong):
        Followers.count(texts, engine.info.vocab_size).save(path / FOLLOWERS_FILE)
        found = generate(engine, PROMPT, open_drafter("both", target), **options)
        assert found.tokens == plain.tokens
        assert (found.accepted == plain.accepted) == (not texts)
    Followers.count([], 7).save(path / FOLLOWERS_FILE)
    with pytest.raises(ConfigError, match=r"followers.npz: got a table of 7 tokens"):
        open_drafter("both", target)


def test_every_kind_is_explained() -> None:
    assert DRAFTS_CHOICES.keys() == {AUTO, *DRAFTS}


def test_what_auto_is(tiny_engine: Callable[..., Any]) -> None:
    info = OnnxRuntimeEngine(tiny_engine().path).info
    trtllm = type(info)(**{**vars(info), "backend": "tensorrt-llm"})
    headless = type(info)(**{**vars(info), "max_depth": 0})
    for engine, own_tree, expected in (
        (info, False, "both"), (info, True, "heads"), (trtllm, False, "heads"), (headless, False, "text"),
    ):  # fmt: skip
        assert settle_drafts(AUTO, engine, own_tree=own_tree) == expected
    assert settle_drafts("heads", info, own_tree=True) == "heads"


@pytest.mark.parametrize("drafts", ["text", "both", "none"])
def test_a_tree_that_nothing_would_use(drafts: str, tiny_engine: Callable[..., Any]) -> None:
    info = OnnxRuntimeEngine(tiny_engine().path).info
    assert settle_drafts(drafts, info, own_tree=False) == drafts
    with pytest.raises(ConfigError, match=f"--tree: got one with --drafts {drafts}; .* --tree requires --drafts heads"):
        settle_drafts(drafts, info, own_tree=True)


def test_refusals(tiny_engine: Callable[..., Any]) -> None:
    info = OnnxRuntimeEngine(tiny_engine().path).info
    with pytest.raises(ConfigError, match="--drafts: got words; expected one of auto, heads, text, both, none"):
        require_drafts("words", info)
    trtllm = type(info)(**{**vars(info), "backend": "tensorrt-llm"})
    for drafts in DRAFTS:
        if drafts in ("heads", "none"):
            require_drafts(drafts, trtllm)
        else:
            with pytest.raises(ConfigError, match=f"got {drafts} for an engine of tensorrt-llm"):
                require_drafts(drafts, trtllm)
    require_drafts(AUTO, trtllm)
    headless = type(info)(**{**vars(info), "max_depth": 0})
    require_drafts("text", headless)
    with pytest.raises(ConfigError, match="both for an engine without heads"):
        require_drafts("both", headless)
    with pytest.raises(TreeError, match="at most 3"):
        TreeDrafter([Tree.from_choices([[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]])], info)
    with pytest.raises(ConfigError, match="top-16"):
        TreeDrafter([Tree.from_choices([[15]])], info)
