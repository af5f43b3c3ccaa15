"""Which node of a step is whose, and that its mask and parents are those of a tree and a chain that know nothing of each other."""

from __future__ import annotations

import numpy as np

from medusa_export.engines.decoding.shapes import StepShape
from medusa_export.heads.decoding.accept import accept_greedy
from medusa_export.heads.trees.tree import Tree

HEADS = Tree.from_choices([[0], [1], [0, 0]])
CANDIDATES = np.array([[[10, 11], [20, 21]], [[12, 13], [22, 23]]])  # [active, depth, top_k]


def path_tokens(shape: StepShape, row: np.ndarray) -> set[tuple[int, ...]]:
    """Every root-to-leaf path as tokens."""
    return {tuple(int(row[node]) for node in path if node >= 0) for path in shape.tree.retrieve_indices}


def test_tree_and_chain_beside_each_other() -> None:
    shape = StepShape(HEADS, 3)
    filled = shape.fill([1, 2], CANDIDATES, [[30, 31, 32, 33], [40]])
    assert shape.tree.num_nodes == 7
    assert path_tokens(shape, filled[0]) == {(1, 10, 20), (1, 11), (1, 30, 31, 32)}
    assert path_tokens(shape, filled[1]) == {(2, 12, 22), (2, 13), (2, 40, 2, 2)}, "the newest token fills what is left"


def test_one_alone() -> None:
    chain = StepShape(Tree(()), 2)
    assert path_tokens(chain, chain.fill([1], None, [[5, 6]])[0]) == {(1, 5, 6)}
    assert path_tokens(StepShape(HEADS), StepShape(HEADS).fill([1], CANDIDATES[:1], [[]])[0]) == {(1, 10, 20), (1, 11)}
    assert StepShape(Tree(())).fill([1, 2], None, [[], []]).tolist() == [[1], [2]]


def test_where_both_draft_the_same_token_the_chain_is_still_taken() -> None:
    shape = StepShape(HEADS, 3)
    (row,) = shape.fill([1], CANDIDATES[:1], [[10, 31, 32]])
    says = {1: 10, 10: 31, 31: 32, 32: 9, 11: 0, 20: 0}
    path, tokens = accept_greedy(shape.tree, row, np.array([says[int(token)] for token in row]))
    assert tokens == [10, 31, 32, 9]
    assert row[path].tolist() == [1, 10, 31, 32]


def test_ranks_with_gaps_leave_the_chain_a_place() -> None:
    shape = StepShape(Tree.from_choices([[0], [2]]), 2)
    candidates = np.array([[[10, 11, 12]]])
    assert path_tokens(shape, shape.fill([1], candidates, [[30, 31]])[0]) == {(1, 10), (1, 12), (1, 30, 31)}
    assert shape.first_ranks == [0, 2]
