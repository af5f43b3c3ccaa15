"""accept_greedy against the definition: the longest root path whose every token is the base model's own choice."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest

from medusa_export.heads.decoding.accept import Typical, accept_drawn, accept_greedy, accept_typical
from medusa_export.heads.decoding.sampling import Sampler
from medusa_export.heads.trees.tree import Choice, Tree, load_tree

Ids = npt.NDArray[np.int64]
VOCAB = 6  # few tokens, so that drafts are often right


def _random_tree(random: np.random.Generator) -> Tree:
    choices: list[Choice] = []
    for _ in range(int(random.integers(0, 25))):
        parents: list[Choice] = [(), *(choice for choice in choices if len(choice) < 5)]
        child = (*parents[int(random.integers(len(parents)))], int(random.integers(VOCAB)))
        if child not in choices:
            choices.append(child)
    return Tree.from_choices(choices)


def _draft(tree: Tree, random: np.random.Generator) -> Ids:
    """Tokens as heads give them: a rank of a head is one token everywhere, and other ranks are others.  # [N]"""
    ranked = [random.permutation(VOCAB) for _ in range(max(tree.depth, 1))]
    return np.array([0] + [ranked[len(choice) - 1][choice[-1]] for choice in tree.choices], dtype=np.int64)


def _brute_force(tree: Tree, node_ids: Ids, argmax_ids: Ids) -> list[int]:
    """Every row of retrieve_indices, cut where a token is not what the base model chose after its parent."""
    best: list[int] = []
    for row in tree.retrieve_indices.tolist():
        path = [0]
        for node in row[1:]:
            if node < 0 or node_ids[node] != argmax_ids[path[-1]]:
                break
            path.append(node)
        best = max(best, path, key=len)
    return best


def greedy_path(tree: Tree, node_ids: Ids, argmax_ids: Ids) -> list[int]:
    return accept_greedy(tree, node_ids, argmax_ids)[0].tolist()


def test_against_brute_force() -> None:
    random = np.random.default_rng(7)
    lengths = []
    for _ in range(400):
        tree = _random_tree(random)
        node_ids, argmax_ids = _draft(tree, random), random.integers(0, VOCAB, tree.num_nodes)
        path, tokens = accept_greedy(tree, node_ids, argmax_ids)
        assert path.dtype == np.int64
        assert path.tolist() == _brute_force(tree, node_ids, argmax_ids)
        assert tokens == argmax_ids[path].tolist()
        lengths.append(len(path))
    assert {1, 2, 3, 4} <= set(lengths), "the draws must cover short and long paths"


def test_a_whole_path_is_accepted() -> None:
    tree = load_tree("medusa-63")
    node_ids = np.arange(100, 100 + tree.num_nodes)
    leaf_path = next(row for row in tree.retrieve_indices.tolist() if -1 not in row)
    argmax_ids = np.zeros(tree.num_nodes, dtype=np.int64)
    for parent, child in pairwise(leaf_path):
        argmax_ids[parent] = node_ids[child]
    assert greedy_path(tree, node_ids, argmax_ids) == leaf_path


@pytest.mark.parametrize("preset", ["none", "cpu-1", "cpu-8", "medusa-63"])
def test_nothing_fits(preset: str) -> None:
    tree = load_tree(preset)
    node_ids = np.ones(tree.num_nodes, dtype=np.int64)
    assert greedy_path(tree, node_ids, np.zeros(tree.num_nodes, dtype=np.int64)) == [0]


def test_the_roots_own_token_is_never_compared() -> None:
    tree = Tree.from_choices([[0]])
    assert greedy_path(tree, np.array([9, 5]), np.array([5, 1])) == [0, 1]


def test_a_fitting_token_under_a_wrong_parent_is_not_accepted() -> None:
    tree = Tree.from_choices([[0], [1], [0, 0], [1, 0]])  # nodes 1, 2 below the root, 3 below 1, 4 below 2
    node_ids, argmax_ids = np.array([0, 5, 6, 7, 7]), np.array([6, 7, 8, 8, 8])
    assert greedy_path(tree, node_ids, argmax_ids) == [0, 2]
    assert greedy_path(tree, node_ids, np.array([6, 8, 7, 8, 8])) == [0, 2, 4]


def test_of_the_same_token_twice_the_better_ranked_wins() -> None:
    tree = Tree.from_choices([[0], [1]])
    assert greedy_path(tree, np.array([0, 5, 5]), np.array([5, 1, 1])) == [0, 1]


def test_below_twins_the_longest_path_is_taken() -> None:
    """Two drafters propose the same token; only the second one's goes on as the base model does, and its end is the path's."""
    tree = Tree.from_choices([[0], [1], [0, 0], [1, 0], [1, 0, 0]])  # nodes 1, 2; 3 below 1, 4 below 2, 5 below 4
    node_ids, argmax_ids = np.array([0, 5, 5, 8, 6, 7]), np.array([5, 6, 6, 1, 7, 9])
    path, tokens = accept_greedy(tree, node_ids, argmax_ids)
    assert (path.tolist(), tokens) == ([0, 2, 4, 5], [5, 6, 7, 9])


def test_a_token_that_twins_carry_is_drawn_once() -> None:
    tree = Tree.from_choices([[0], [1], [1, 0]])
    drawn = iter([5, 6, 7])
    path, tokens = accept_drawn(tree, np.array([0, 5, 5, 6]), lambda node: next(drawn))
    assert (path.tolist(), tokens) == ([0, 2, 3], [5, 6, 7])


MODEL = np.array([[0.5, 0.2, 0.2, 0.1], [0.1, 0.6, 0.1, 0.2], [0.3, 0.3, 0.3, 0.1], [0.25, 0.05, 0.4, 0.3]])


@pytest.mark.parametrize("choices", [[], [[0], [1]], [[0], [1], [0, 0], [1, 0], [1, 1], [0, 0, 0]]], ids=len)
def test_drawn_text_has_the_distribution_of_the_model(choices: list[list[int]]) -> None:
    """A chain of 10^5 tokens through a tree whose drafts favour some tokens: pairs are as frequent as the model says."""
    tree, chance = Tree.from_choices(choices), np.random.default_rng(4)
    ranked = [np.array([2, 0, 1, 3]), np.array([0, 1, 2, 3]), np.array([3, 1, 0, 2])]
    text, steps = [0], 0
    while len(text) < 100_000:
        node_ids = [text[-1]] + [int(ranked[len(choice) - 1][choice[-1]]) for choice in tree.choices]
        cumulative = MODEL[node_ids].cumsum(-1)
        _, tokens = accept_drawn(
            tree, np.array(node_ids), lambda node, c=cumulative: int(np.searchsorted(c[node], chance.random()))
        )
        text += tokens
        steps += 1
    pairs = np.zeros((4, 4))
    np.add.at(pairs, (text[:-1], text[1:]), 1)
    expected = pairs.sum(1, keepdims=True) * MODEL
    assert ((pairs - expected) ** 2 / expected).sum() < 32.9  # chi-square, 12 degrees of freedom, at 0.001
    assert (steps < 90_000) == bool(choices)


def test_a_drawn_path_draws_every_token_once_and_in_order() -> None:
    tree = Tree.from_choices([[0], [1], [0, 0], [1, 0]])
    asked: list[int] = []

    def draw(node: int) -> int:
        asked.append(node)
        return {0: 8, 2: 5, 4: 6}[node]

    path, tokens = accept_drawn(tree, np.array([1, 7, 8, 5, 5]), draw)
    assert (path.tolist(), tokens, asked) == ([0, 2, 4], [8, 5, 6], [0, 2, 4])


class TestTypical:
    """By hand: a vocabulary of four, the root 0, and what the base model thinks behind each node."""

    tree = Tree.from_choices([[0], [1], [0, 0], [1, 0]])
    node_ids = np.array([0, 1, 2, 3, 3])

    def accept(self, *shares: list[float], temperature: float = 1.0, **rule: float) -> list[int]:
        logits = np.log(np.array(shares, dtype=np.float32)) + 5
        path, tokens = accept_typical(self.tree, self.node_ids, logits, Sampler(temperature, 3), Typical(**rule))
        assert tokens[:-1] == self.node_ids[path[1:]].tolist()
        assert tokens[-1] == Sampler(temperature, 3).draw(logits[path[-1]])
        return path.tolist()

    flat = [0.25] * 4

    def test_likely_drafts_stand_whatever_would_be_drawn(self) -> None:
        assert self.accept([0.6, 0.2, 0.1, 0.1], *[self.flat] * 4, threshold=0.15, alpha=9) == [0, 1, 3]

    def test_the_longest_path_then_the_likeliest(self) -> None:
        root = [0.1, 0.5, 0.3, 0.1]
        assert self.accept(root, [0.4, 0.4, 0.1, 0.1], *[self.flat] * 3, threshold=0.2, alpha=9) == [0, 2, 4]
        assert self.accept(root, *[self.flat] * 4, threshold=0.2, alpha=9) == [0, 1, 3]
        assert self.accept([0.1, 0.3, 0.5, 0.1], *[self.flat] * 4, threshold=0.2, alpha=9) == [0, 2, 4]

    def test_a_child_of_what_does_not_stand_does_not(self) -> None:
        assert self.accept([0.9, 0.05, 0.03, 0.02], *[self.flat] * 4, threshold=0.1, alpha=9) == [0]

    def test_where_everything_is_possible_less_is_asked(self) -> None:
        """The entropy of the flat distribution is log 4: its threshold is alpha / 4."""
        assert self.accept(self.flat, *[self.flat] * 4, threshold=0.5, alpha=0.9) == [0, 1, 3]
        assert self.accept(self.flat, *[self.flat] * 4, threshold=0.5, alpha=1.1) == [0]

    def test_temperature(self) -> None:
        root = [0.6, 0.2, 0.1, 0.1]
        assert self.accept(root, *[self.flat] * 4, threshold=0.21, alpha=9) == [0]
        assert self.accept(root, *[self.flat] * 4, threshold=0.21, alpha=9, temperature=2.0) == [0, 1, 3]
