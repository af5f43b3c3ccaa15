"""Tree: every table against its definition, every rule against a tree that breaks it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_export.core.errors import TreeError
from medusa_export.heads.trees.tree import MAX_CHOICES, MAX_DEPTH, MAX_TOP_K, PRESETS, Choice, Tree, load_tree


@st.composite
def prefix_closed(draw: st.DrawFn, max_nodes: int = 20) -> list[Choice]:
    """Choices in random order, grown node by node from the root."""
    known: list[Choice] = []
    for _ in range(draw(st.integers(0, max_nodes))):
        parent = draw(st.sampled_from([(), *(choice for choice in known if len(choice) < MAX_DEPTH)]))
        child = (*parent, draw(st.integers(0, MAX_TOP_K - 1)))
        if child not in known:
            known.append(child)
    return draw(st.permutations(known))


@given(prefix_closed())
@settings(max_examples=150, deadline=None)
def test_tables_follow_their_definitions(choices: list[Choice]) -> None:
    tree = Tree.from_choices(choices)
    nodes: list[Choice] = [(), *sorted(choices, key=lambda choice: (len(choice), choice))]
    assert [(), *tree.choices] == nodes
    assert tree.num_nodes == tree.max_draft_len + 1 == len(nodes)
    assert tree.depth == max(map(len, nodes))
    assert tree.top_k == 1 + max((choice[-1] for choice in choices), default=0)
    assert tree.depths.tolist() == [len(node) for node in nodes]
    assert tree.parents.tolist() == [nodes.index(node[:-1]) for node in nodes]
    assert tree.parent_list == tree.parents[1:].tolist()
    assert tree.mask.tolist() == [[node[: len(other)] == other for other in nodes] for node in nodes]
    heads, ranks = tree.heads_and_ranks
    assert list(zip(heads.tolist(), ranks.tolist(), strict=True)) == [(len(node) - 1, node[-1]) for node in nodes[1:]]


@given(prefix_closed())
@settings(max_examples=100, deadline=None)
def test_retrieve_indices_are_the_root_to_leaf_paths(choices: list[Choice]) -> None:
    tree = Tree.from_choices(choices)
    nodes: list[Choice] = [(), *tree.choices]
    leaves = [node for node in nodes if not any(other[:-1] == node for other in nodes[1:])]
    expected = {tuple(nodes.index(leaf[:level]) for level in range(len(leaf) + 1)) for leaf in leaves}
    rows = tree.retrieve_indices
    assert rows.shape == (len(leaves), tree.depth + 1)
    found = [tuple(node for node in row if node >= 0) for row in rows.tolist()]
    assert len(found) == len(set(found))
    assert set(found) == expected
    for row in rows:  # padding only at the end
        assert (np.flatnonzero(row >= 0) == np.arange((row >= 0).sum())).all()


@given(prefix_closed())
@settings(max_examples=50, deadline=None)
def test_json_and_triton_say_the_same_tree(choices: list[Choice]) -> None:
    tree = Tree.from_choices(choices)
    body = json.loads(tree.to_json())
    assert body["max_draft_len"] == len(choices)
    assert Tree.from_choices(body["medusa_choices"]) == tree
    triton = json.loads("[" + tree.to_triton().replace("{", "[").replace("}", "]") + "]")
    assert [tuple(choice) for choice in triton] == list(tree.choices)


def test_a_small_tree_by_hand() -> None:
    tree = Tree.from_choices([[1], [0, 2], [0], [1, 0], [0, 2, 1]])
    assert tree.choices == ((0,), (1,), (0, 2), (1, 0), (0, 2, 1))
    assert tree.parents.tolist() == [0, 0, 0, 1, 2, 3]
    assert tree.depths.tolist() == [0, 1, 1, 2, 2, 3]
    assert tree.mask.astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 0, 1, 0, 1, 0],
        [1, 1, 0, 1, 0, 1],
    ]
    assert tree.retrieve_indices.tolist() == [[0, 2, 4, -1], [0, 1, 3, 5]]
    assert tree.top_k == 3
    assert tree.to_triton() == "{0}, {1}, {0, 2}, {1, 0}, {0, 2, 1}"


def test_the_empty_tree_is_plain_decoding() -> None:
    tree = load_tree("none")
    assert (tree.num_nodes, tree.depth, tree.max_draft_len) == (1, 0, 0)
    assert tree.parents.tolist() == [0]
    assert tree.mask.tolist() == [[True]]
    assert tree.retrieve_indices.tolist() == [[0]]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([[0], [0]], r"tree choice \[0\]: got the same path twice"),
        ([[0], [16]], r"tree choice \[16\]: got top-k index 16; expected 0 \.\. 15"),
        ([[0], [-1]], r"tree choice \[-1\]: got top-k index -1"),
        ([[0], [1, 0]], r"tree choice \[1, 0\]: got no parent \[1\]"),
        ([[0], [0, 0, 0]], r"tree choice \[0, 0, 0\]: got no parent \[0, 0\]"),
        ([[0] * level for level in range(1, 18)], r"got depth 17; expected at most 16"),
        ([[]], r"tree choice \[\]: got no list of integers"),
        ([0], r"tree choice 0: got no list of integers"),
        (["01"], r"tree choice '01': got no list of integers"),
        ([[0.0]], r"tree choice \[0\.0\]: got no list of integers"),
        ([[True]], r"tree choice \[True\]: got no list of integers"),
        ([[None]], r"tree choice \[None\]: got no list of integers"),
        (["x" * 10**6], r"^tree choice 'x{12}\.\.\.x{13}': got no list of integers"),
        ([[0] * 10**6], r"^tree choice \[0, 0, 0, 0, 0, 0, \.\.\.\]: got depth 1000000; expected at most 16"),
        ([[i] for i in range(MAX_CHOICES + 1)], r"tree: got 1025 choices; expected at most 1024"),
    ],
)
def test_every_rule_has_an_error(choices: Any, message: str) -> None:
    with pytest.raises(TreeError, match=message):
        Tree.from_choices(choices)


def test_the_limits_themselves_are_allowed() -> None:
    assert Tree.from_choices([[0] * level for level in range(1, MAX_DEPTH + 1)]).depth == 16
    assert Tree.from_choices([[MAX_TOP_K - 1]]).top_k == 16
    paths = [[a] for a in range(16)] + [[a, b] for a in range(16) for b in range(16)]
    deeper = [[a, b, c] for a in range(3) for b in range(16) for c in range(16)]
    assert Tree.from_choices([*paths, *deeper][:MAX_CHOICES]).max_draft_len == MAX_CHOICES


def test_choices_out_of_order_are_refused_when_not_sorted_for_you() -> None:
    with pytest.raises(TreeError, match="choices out of order"):
        Tree(((1,), (0,)))


def test_a_tree_deeper_than_the_heads() -> None:
    choices = [[0], [0, 0], [0, 0, 0]]
    assert Tree.from_choices(choices, num_medusa_heads=3).depth == 3
    with pytest.raises(TreeError, match="a path of depth 3; expected at most 2"):
        Tree.from_choices(choices, num_medusa_heads=2)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name: str) -> None:
    tree = load_tree(name)
    assert sorted(tree.choices) == sorted(PRESETS[name])
    if name.startswith("cpu-"):
        assert tree.max_draft_len == int(name.removeprefix("cpu-"))


def test_medusa_63() -> None:
    tree = load_tree("medusa-63", num_medusa_heads=4)
    assert tree.max_draft_len == 63
    assert tree.depth == 4
    assert max(index for choice in tree.choices for index in choice) == 9
    by_depth = [sum(len(choice) == level for choice in tree.choices) for level in range(1, 5)]
    assert by_depth == [10, 28, 23, 2]
    with pytest.raises(TreeError, match="a path of depth 4"):
        load_tree("medusa-63", num_medusa_heads=3)


def test_trees_from_files(tmp_path: Path) -> None:
    tree = Tree.from_choices([[0], [1], [0, 0]])
    (tmp_path / "list.json").write_text("[[0, 0], [0], [1]]")
    (tmp_path / "object.json").write_text(tree.to_json())
    assert load_tree(str(tmp_path / "list.json")) == tree
    assert load_tree(str(tmp_path / "object.json")) == tree
    with pytest.raises(TreeError, match="depth 2"):
        load_tree(str(tmp_path / "object.json"), num_medusa_heads=1)


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"\xff\xff",
        b"[" * 100_000,
        b"[[" + b"9" * 5000 + b"]]",
        b"5",
        b'"none"',
        b"{}",
        b'{"medusa_choices": {}}',
        b"[[0, 1]]",
    ],
)
def test_bad_tree_files(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "tree.json").write_bytes(text)
    with pytest.raises(TreeError):
        load_tree(str(tmp_path / "tree.json"))


def test_an_unknown_tree_names_the_presets(tmp_path: Path) -> None:
    with pytest.raises(TreeError, match=r"no such file or preset; expected a JSON file or one of none, .*medusa-63"):
        load_tree("medusa-64")


@pytest.mark.timeout(60, method="thread")  # an opened FIFO waits, out of the reach of signals
def test_what_is_no_tree_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for spec, message in {
        str(tmp_path): "got a directory; expected a JSON file",
        str(tmp_path / "fifo"): "got a FIFO; expected a JSON file",
        str([[0], [1]] * 500): r"got a path that cannot be read \(File name too long\)",
    }.items():
        with pytest.raises(TreeError, match=message):
            load_tree(spec)


# FasterDecoding/Medusa, medusa_choices.py, in its order.
MC_SIM_7B_63 = [
    [0], [0, 0], [1], [0, 1], [2], [0, 0, 0], [1, 0], [0, 2], [3], [0, 3], [4], [0, 4], [2, 0], [0, 5], [0, 0, 1], [5], [0, 6], [6],
    [0, 7], [0, 1, 0], [1, 1], [7], [0, 8], [0, 0, 2], [3, 0], [0, 9], [8], [9], [1, 0, 0], [0, 2, 0], [1, 2], [0, 0, 3], [4, 0],
    [2, 1], [0, 0, 4], [0, 0, 5], [0, 0, 0, 0], [0, 1, 1], [0, 0, 6], [0, 3, 0], [5, 0], [1, 3], [0, 0, 7], [0, 0, 8], [0, 0, 9],
    [6, 0], [0, 4, 0], [1, 4], [7, 0], [0, 1, 2], [2, 0, 0], [3, 1], [2, 2], [8, 0], [0, 5, 0], [1, 5], [1, 0, 1], [0, 2, 1], [9, 0],
    [0, 6, 0], [0, 0, 0, 1], [1, 6], [0, 7, 0],
]  # fmt: skip


def test_presets_are_the_published_trees() -> None:
    assert load_tree("medusa-63") == Tree.from_choices(MC_SIM_7B_63)
    assert load_tree("cpu-1").choices == ((0,),)
    assert load_tree("cpu-3").choices == ((0,), (1,), (2,))
    assert load_tree("cpu-4").choices == ((0,), (1,), (2,), (0, 0))
    assert load_tree("cpu-8").choices == ((0,), (1,), (2,), (3,), (0, 0), (0, 1), (1, 0), (0, 0, 0))
    assert list(PRESETS) == ["none", "cpu-1", "cpu-3", "cpu-4", "cpu-8", "medusa-63"]


@given(prefix_closed())
@settings(max_examples=50, deadline=None)
def test_paths_and_children_follow_the_parents(choices: list[Choice]) -> None:
    tree = Tree.from_choices(choices)
    nodes: list[Choice] = [(), *tree.choices]
    for node, choice in enumerate(nodes):
        assert [nodes[index] for index in tree.path_to(node)] == [choice[:level] for level in range(len(choice) + 1)]
        assert [nodes[index] for index in tree.children[node]] == [each for each in nodes[1:] if each[:-1] == choice]
