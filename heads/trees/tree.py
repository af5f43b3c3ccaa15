"""Medusa trees: choices, their masks and positions, and the rules that TensorRT-LLM puts on them.

A choice is a path of top-k indices: ``(0, 1)`` is "the best token of head 0, then the second best of head 1". The root (the
last accepted token) is not listed. Source: Medusa (arXiv 2401.10774, section 2.1.2) and TensorRT-LLM's
``speculativeChoicesUtils``; the rules that only some runtimes check are all checked here.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from medusa_export.core.errors import TreeError
from medusa_export.core.json_fields import json_kind, unreadable
from medusa_export.core.regular_files import ABSENT, found_instead

if TYPE_CHECKING:  # arrays are made on demand: --help and readers of tree.json need no NumPy
    import numpy as np
    import numpy.typing as npt

Choice = tuple[int, ...]

MAX_TOP_K = 16  # TensorRT-LLM packs a top-k index into 4 bits, so ids are 0 .. 15
MAX_DEPTH = 16  # and a path into 64 bits
MAX_CHOICES = 1024  # 16 times the paper's largest tree; the masks grow with the square

_SHORT = reprlib.Repr()  # a wrong entry may be of any size


@dataclass(frozen=True)
class Tree:
    """A validated tree of draft tokens, in breadth-first order (parents before children).

    All index arrays count nodes with the root as node 0; node ``i`` is ``choices[i - 1]``.
    """

    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        _check(self.choices)

    @classmethod
    def from_choices(cls, choices: Iterable[Sequence[int]], *, num_medusa_heads: int | None = None) -> Tree:
        """Sort and validate choices.

        Args:
            choices: paths of top-k indices, in any order, without the root.
            num_medusa_heads: when given, no path may be longer than this.

        Raises:
            TreeError: an empty path, duplicates, not prefix closed, an id outside 0..15, or too deep.
        """
        paths = [_as_path(choice) for choice in choices]
        tree = cls(tuple(sorted(paths, key=lambda path: (len(path), path))))
        if num_medusa_heads is not None:
            tree.require_heads(num_medusa_heads)
        return tree

    def require_heads(self, num_medusa_heads: int) -> None:
        """Raise TreeError when the tree is deeper than there are heads."""
        if self.depth > num_medusa_heads:
            raise TreeError(
                "tree",
                f"a path of depth {self.depth}",
                f"at most {num_medusa_heads}, one level a Medusa head",
                "drop the deeper choices or use a checkpoint with more heads",
            )

    @property
    def max_draft_len(self) -> int:
        """Number of draft nodes; TensorRT-LLM builds the engine for exactly this many."""
        return len(self.choices)

    @property
    def num_nodes(self) -> int:
        """Tokens verified in one step: the root and every draft node."""
        return len(self.choices) + 1

    @property
    def depth(self) -> int:
        """Length of the longest path: how many heads the tree uses."""
        return max((len(choice) for choice in self.choices), default=0)

    @cached_property
    def parents(self) -> npt.NDArray[np.int64]:
        """Index of every node's parent, the root's being itself.  # [N]"""
        import numpy as np

        index = {choice: node for node, choice in enumerate(self.choices, start=1)}
        return np.array([0] + [index.get(choice[:-1], 0) for choice in self.choices], dtype=np.int64)

    @cached_property
    def parent_list(self) -> list[int]:
        """Parents of the draft nodes as Python ints, for the step loop.  # [N - 1]"""
        return [int(parent) for parent in self.parents[1:]]

    @cached_property
    def children(self) -> list[list[int]]:
        """Of every node, for the step loop.  # [N] lists"""
        found: list[list[int]] = [[] for _ in range(self.num_nodes)]
        for node, parent in enumerate(self.parent_list, start=1):
            found[parent].append(node)
        return found

    @cached_property
    def _paths(self) -> list[npt.NDArray[np.int64]]:
        import numpy as np

        paths = [[0]]
        for node, parent in enumerate(self.parent_list, start=1):
            paths.append([*paths[parent], node])
        return [np.array(path, dtype=np.int64) for path in paths]

    def path_to(self, node: int) -> npt.NDArray[np.int64]:
        """The root, what leads from it to a node, and the node.  # [depth of the node + 1]"""
        return self._paths[node]

    @cached_property
    def depths(self) -> npt.NDArray[np.int64]:
        """Position of every node relative to the root.  # [N]"""
        import numpy as np

        return np.array([0] + [len(choice) for choice in self.choices], dtype=np.int64)

    @cached_property
    def mask(self) -> npt.NDArray[np.bool_]:
        """mask[i, j]: node i attends to node j, that is j is i or one of its ancestors.  # [N, N]"""
        import numpy as np

        mask = np.eye(self.num_nodes, dtype=bool)
        for node in range(1, self.num_nodes):
            mask[node] |= mask[self.parents[node]]
        return mask

    @cached_property
    def heads_and_ranks(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """For every draft node, the head that proposes it and the rank of its token there.  # 2 x [N - 1]"""
        import numpy as np

        heads = np.array([len(choice) - 1 for choice in self.choices], dtype=np.int64)
        ranks = np.array([choice[-1] for choice in self.choices], dtype=np.int64)
        return heads, ranks

    @property
    def top_k(self) -> int:
        """How many candidates of a head the tree looks at, at most."""
        return 1 + max((choice[-1] for choice in self.choices), default=0)

    @cached_property
    def retrieve_indices(self) -> npt.NDArray[np.int64]:
        """Node indices of every root-to-leaf path, padded with -1.  # [leaves, depth + 1]"""
        import numpy as np

        inner = set(self.parents[1:].tolist())
        leaves = [node for node in range(self.num_nodes) if node not in inner] if self.choices else [0]
        table = np.full((len(leaves), self.depth + 1), -1, dtype=np.int64)
        for row, leaf in enumerate(leaves):
            node = leaf
            for level in range(int(self.depths[leaf]), -1, -1):
                table[row, level] = node
                node = int(self.parents[node])
        return table

    def to_triton(self) -> str:
        """The ``medusa_choices`` parameter of Triton's tensorrtllm backend: ``{0}, {0, 0}``."""
        return ", ".join("{" + ", ".join(map(str, choice)) + "}" for choice in self.choices)

    def to_json(self) -> str:
        """The text of a tree.json file."""
        body = {"max_draft_len": self.max_draft_len, "medusa_choices": [list(choice) for choice in self.choices]}
        return json.dumps(body, separators=(", ", ": ")) + "\n"


def load_tree(spec: str, *, num_medusa_heads: int | None = None) -> Tree:
    """A tree from a preset's name or a JSON file: a list of choices, or an object with ``medusa_choices``.

    Raises:
        TreeError: neither a preset nor a readable file, or a tree that breaks a rule.
    """
    if spec in PRESETS:
        return Tree.from_choices(PRESETS[spec], num_medusa_heads=num_medusa_heads)
    path = Path(spec)
    kind = found_instead(path)
    if kind is not None:
        got = "no such file or preset" if kind == ABSENT else kind
        raise TreeError(f"tree {spec}", got, f"a JSON file or one of {', '.join(PRESETS)}", "check the name")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise TreeError(str(path), unreadable(error), "a list of choices", "write it again") from error
    choices = body.get("medusa_choices") if isinstance(body, dict) else body
    if not isinstance(choices, list):
        got = "no medusa_choices" if choices is None and isinstance(body, dict) else f"a JSON {json_kind(choices)}"
        raise TreeError(str(path), got, "a list like [[0], [1], [0, 0]]", "write it again")
    return Tree.from_choices(choices, num_medusa_heads=num_medusa_heads)


def _as_path(choice: object) -> Choice:
    """One choice as a tuple of ints; bool and float are refused rather than converted."""
    ids = tuple(choice) if isinstance(choice, (list, tuple)) else None
    if not ids or any(type(index) is not int for index in ids):
        raise TreeError(
            f"tree choice {_SHORT.repr(choice)}", "no list of integers", "a path like [0, 1]", "correct the entry"
        )
    return ids


def _check(choices: tuple[Choice, ...]) -> None:
    """Every rule of section 5.4 of TensorRT-LLM's decoding, also those that its runtimes skip."""
    if len(choices) > MAX_CHOICES:
        raise TreeError("tree", f"{len(choices)} choices", f"at most {MAX_CHOICES}", "leave out the least likely ones")
    known = set(choices)
    if len(known) < len(choices):
        twice = next(choice for choice in choices if choices.count(choice) > 1)
        raise TreeError(f"tree choice {list(twice)}", "the same path twice", "each path once", "remove one")
    for choice in choices:
        if len(choice) > MAX_DEPTH:
            raise TreeError(
                f"tree choice {_SHORT.repr(list(choice))}", f"depth {len(choice)}", f"at most {MAX_DEPTH}", "shorten it"
            )
        if not all(0 <= index < MAX_TOP_K for index in choice):
            raise TreeError(
                f"tree choice {list(choice)}",
                f"top-k index {max(choice) if min(choice) >= 0 else min(choice)}",
                f"0 .. {MAX_TOP_K - 1} (TensorRT-LLM keeps 4 bits a level)",
                "drop the choice",
            )
        if len(choice) > 1 and choice[:-1] not in known:
            raise TreeError(
                f"tree choice {list(choice)}",
                f"no parent {list(choice[:-1])}",
                "a prefix-closed list (a missing parent is silently taken as the root by TensorRT-LLM)",
                "add the parent",
            )
    if list(choices) != sorted(choices, key=lambda path: (len(path), path)):
        raise TreeError("tree", "choices out of order", "breadth-first order", "build it with Tree.from_choices")


def _chain(length: int) -> list[Choice]:
    return [(0,) * level for level in range(1, length + 1)]


def _siblings(widths: dict[Choice, int]) -> list[Choice]:
    """Choices from the number of children of every parent; children are always the ranks 0, 1, 2 ... of the next head."""
    return [(*parent, rank) for parent, width in widths.items() for rank in range(width)]


# medusa-63 is the tree of the Medusa paper's 7B model (mc_sim_7b_63 of FasterDecoding/Medusa's medusa_choices.py, Apache-2.0),
# which TensorRT-LLM also falls back to. The cpu trees are the best
# ones of their size for the heads in examples/ on Spec-Bench questions; better heads want deeper ones.
PRESETS: dict[str, list[Choice]] = {
    "none": [],
    "cpu-1": _siblings({(): 1}),
    "cpu-3": _siblings({(): 3}),
    "cpu-4": _siblings({(): 3, (0,): 1}),
    "cpu-8": _siblings({(): 4, (0,): 2, (1,): 1, (0, 0): 1}),
    "medusa-63": _siblings(
        {
            (): 10, (0,): 10, (1,): 7, (2,): 3, (3,): 2, (4,): 1, (5,): 1, (6,): 1, (7,): 1, (8,): 1, (9,): 1,
            (0, 0): 10, (0, 1): 3, (0, 2): 2, (0, 3): 1, (0, 4): 1, (0, 5): 1, (0, 6): 1, (0, 7): 1,
            (1, 0): 2, (2, 0): 1, (0, 0, 0): 2,
        }
    ),
}  # fmt: skip
