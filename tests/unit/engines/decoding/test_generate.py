"""The decode loop, driven by a scripted stand-in for an engine: where it stops, what it cuts and what it falls back to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.engines.decoding.generate import generate
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE, Generation
from medusa_export.heads.trees.tree import Tree

PROMPT = [1, 2, 3]
TRUTH = list(range(100, 160))  # what the scripted model says, token after token
WRONG, LOST = 7, 8  # a draft that is never right; what the model says off its script
CHAIN = Tree.from_choices([[0], [0, 0], [0, 0, 0]])
WIDE = Tree.from_choices([[0], [1], [0, 0], [1, 0], [1, 1]])
EOS = 99


class Info:
    """As much of EngineInfo as the loop reads."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length

    def require_tree(self, tree: Tree) -> None:
        """Any tree will do."""

    def require_known(self, input_ids: Sequence[int]) -> None:
        """The script has every token."""


class ScriptedEngine:
    """A stand-in for an engine, no model in it: it continues the prompt with ``truth`` as long as the cache holds just that.

    Args:
        ranks: by head, the rank that holds the right token; the others are wrong. -1 is a head that is always wrong.
    """

    def __init__(self, truth: Sequence[int] = TRUTH, ranks: Sequence[int] = (0,) * 16, max_length: int = 1000) -> None:
        self.info: Any = Info(max_length)
        self.truth, self.ranks = list(truth), ranks
        self.rows: list[int] = []
        self.trees: list[Tree] = []
        self.max_nodes = 64
        self.drafts, self.backend_seconds = 0, 0.0
        self.opened: list[int] = []

    def say(self, text: Sequence[int]) -> int:
        """The next token after a text: the script's, where the text follows it."""
        done = list(text[len(PROMPT) :])
        return self.truth[len(done)] if done == self.truth[: len(done)] else LOST

    def prefill(self, input_ids: Sequence[int]) -> int:
        self.rows = list(input_ids)
        return self.say(self.rows)

    def prefill_logits(self, input_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        logits = np.zeros(max(*self.truth, LOST) + 1, dtype=np.float32)
        logits[self.prefill(input_ids)] = 1
        return logits

    def prepare(self, tree: Tree) -> ScriptedStep:
        self.trees.append(tree)
        return ScriptedStep(self, tree)

    def open_heads(self, depth: int) -> None:
        self.opened.append(depth)

    def draft(self, depth: int) -> npt.NDArray[np.int64]:
        self.drafts += 1
        table = np.full((16, 4), WRONG, dtype=np.int64)
        done = len(self.rows) - len(PROMPT)  # the next token is known already; head 0 guesses the one after it
        for head, rank in enumerate(self.ranks[:depth]):
            if rank >= 0:
                table[head, rank] = self.truth[done + 1 + head]
        return table[:depth]

    @property
    def length(self) -> int:
        return len(self.rows)


class ScriptedStep:
    """One tree on the stand-in."""

    def __init__(self, engine: ScriptedEngine, tree: Tree) -> None:
        self.engine, self.tree = engine, tree

    def verify(self, node_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        assert self.engine.length + len(node_ids) <= self.engine.info.max_length, "the cache would overflow"
        self.node_ids = node_ids
        self.engine.backend_seconds += 1e-9
        paths = [[*self.engine.rows, *node_ids[visible].tolist()] for visible in self.tree.mask]
        return np.array([self.engine.say(path) for path in paths])

    def commit(self, path: npt.NDArray[np.int64]) -> None:
        self.engine.rows += self.node_ids[path].tolist()


def run(engine: ScriptedEngine, tree: Tree, new: int, eos: Sequence[int] = ()) -> Generation:
    return generate(engine, PROMPT, tree, max_new_tokens=new, eos_token_ids=eos)


def with_eos(at: int) -> list[int]:
    return [*TRUTH[:at], EOS, *TRUTH[at:]]


@pytest.mark.parametrize(
    ("tree", "ranks", "per_step"),
    [
        (AUTOREGRESSIVE, (0, 0, 0), 1), (CHAIN, (0, 0, 0), 4), (CHAIN, (0, 0, -1), 3), (CHAIN, (0, -1, 0), 2),
        (CHAIN, (-1, 0, 0), 1), (CHAIN, (1, 0, 0), 1), (WIDE, (1, 0, -1), 3), (WIDE, (1, 1, -1), 3), (WIDE, (0, 1, -1), 2),
        (WIDE, (0, 0, 0), 3), (WIDE, (2, 0, 0), 1),
    ],
)  # fmt: skip
def test_accepts_what_the_model_would_have_said(tree: Tree, ranks: tuple[int, ...], per_step: int) -> None:
    engine = ScriptedEngine(ranks=ranks)
    result = run(engine, tree, 25)
    assert result.tokens == TRUTH[:25]
    assert result.finish_reason == "length"
    steps, rest = divmod(24, per_step)
    assert result.accepted == [per_step] * steps + [rest] * bool(rest), "the last step is cut"
    assert engine.rows == [*PROMPT, *TRUTH[: len(engine.rows) - len(PROMPT)]], "only accepted tokens are kept"
    assert engine.drafts == (len(result.accepted) if tree.max_draft_len else 0)


@pytest.mark.parametrize("tree", [AUTOREGRESSIVE, CHAIN, WIDE])
@pytest.mark.parametrize("at", range(12))
def test_ends_with_the_first_end_of_sequence(tree: Tree, at: int) -> None:
    """Wherever in an accepted path it falls; a second one behind it, and what follows, is dropped."""
    truth = [*with_eos(at)[: at + 1], EOS, *TRUTH]
    result = run(ScriptedEngine(truth), tree, 30, [98, EOS])
    assert (result.tokens, result.finish_reason) == ([*TRUTH[:at], EOS], "stop")
    assert 1 + sum(result.accepted) == len(result.tokens)


def test_end_of_sequence_first_in_the_longest_step() -> None:
    tree = Tree.from_choices([[0] * depth for depth in range(1, 17)])
    result = run(ScriptedEngine(with_eos(1)), tree, 40, [EOS])
    assert (result.tokens, result.finish_reason, result.accepted) == ([TRUTH[0], EOS], "stop", [1])


@pytest.mark.parametrize("tree", [AUTOREGRESSIVE, CHAIN, WIDE])
@pytest.mark.parametrize("new", range(1, 10))
def test_is_cut_at_max_new_tokens(tree: Tree, new: int) -> None:
    result = run(ScriptedEngine(), tree, new)
    assert (result.tokens, result.finish_reason) == (TRUTH[:new], "length")
    assert 1 + sum(result.accepted) == new


def test_what_is_dropped_is_no_steps() -> None:
    """Also where a runtime's last step is empty, or gave its first tokens at once."""
    result = Generation(tokens=list(range(10)), accepted=[3, 4, 0])
    result.keep(12)
    assert result.accepted == [3, 4, 0]
    result.keep(5)
    assert (result.tokens, result.accepted) == ([0, 1, 2, 3, 4], [2, 0, 0])


def test_an_end_of_sequence_behind_the_cut_is_not_the_reason() -> None:
    result = run(ScriptedEngine(with_eos(6)), CHAIN, 6, [EOS])  # 1 + 4 + 4 tokens, the seventh ends
    assert (result.tokens, result.finish_reason) == (TRUTH[:6], "length")
    result = run(ScriptedEngine(with_eos(5)), CHAIN, 6, [EOS])
    assert (result.tokens, result.finish_reason) == ([*TRUTH[:5], EOS], "stop")


@pytest.mark.parametrize("eos", [[], [0], [EOS]])
def test_no_step_after_a_first_token_that_ends(eos: list[int]) -> None:
    result = run(ScriptedEngine(with_eos(0)), CHAIN, 3, eos)
    assert result.accepted == ([] if EOS in eos else [2])


@pytest.mark.parametrize("max_length", range(4, 16))
def test_uses_the_context_to_the_last_row(max_length: int) -> None:
    engine = ScriptedEngine(max_length=max_length)
    result = run(engine, CHAIN, 50)
    room = max_length - len(PROMPT)
    assert (result.tokens, result.finish_reason) == (TRUTH[: room + 1], "context")
    assert engine.length == max_length
    made_ready, *verified = engine.trees
    assert (made_ready, engine.opened) == (CHAIN, [CHAIN.depth]), "before anything is timed"
    single = [tree is AUTOREGRESSIVE for tree in verified]
    assert single == [False] * (room // 4) + [True] * (room % 4), "single steps only where the tree does not fit"


def test_the_whole_context_just_fits() -> None:
    result = run(ScriptedEngine(max_length=len(PROMPT) + 4), CHAIN, 5)
    assert (result.tokens, result.finish_reason) == (TRUTH[:5], "length")


@pytest.mark.parametrize("prompt", [[], [1] * 10, [1] * 11])
def test_prompts_that_do_not_fit(prompt: list[int]) -> None:
    engine = ScriptedEngine(max_length=10)
    with pytest.raises(ConfigError, match=rf"prompt: got {len(prompt)} tokens; expected 1 \.\. 9"):
        generate(engine, prompt, CHAIN, max_new_tokens=4, eos_token_ids=())
    assert engine.length == 0


def test_times() -> None:
    result = run(ScriptedEngine(), CHAIN, 20)
    assert result.prefill_ms > 0
    assert result.total_ms == result.prefill_ms + result.decode_ms
    assert result.backend_ms == pytest.approx(len(result.accepted) * 1e-6)
    assert run(ScriptedEngine(), CHAIN, 1).backend_ms == 0
