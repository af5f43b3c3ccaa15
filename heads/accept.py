"""Acceptance of a verified tree, greedy or drawn; both are lossless (Medusa, arXiv 2401.10774, 2.3)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from medusa_export.heads.tree import Tree


def accept_greedy(
    tree: Tree, node_ids: npt.NDArray[np.int64], argmax_ids: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """The longest path from the root on which every draft token is what the base model would have chosen itself.

    Because siblings carry different tokens, at most one child of a node can match, so one walk down the breadth-first order
    finds the path; where a head proposed the same token twice, the first (better ranked) one wins.

    Args:
        tree: the tree that was verified.
        node_ids: token of every node, the root first.  # [N]
        argmax_ids: the base model's greedy next token after every node.  # [N]

    Returns:
        Accepted node indices, the root first.  # [1 .. depth + 1]
        The next token, not part of the tree, is ``argmax_ids[path[-1]]``.
    """
    return accept_drawn(tree, node_ids, lambda node: int(argmax_ids[node]))[0]


def accept_drawn(
    tree: Tree, node_ids: npt.NDArray[np.int64], draw: Callable[[int], int]
) -> tuple[npt.NDArray[np.int64], list[int]]:
    """The path that tokens take through the tree when each is drawn from the base model's distribution behind the one before it.

    Every token is drawn once, in order, from what plain sampling would draw it from, whatever was drafted; a draft only decides
    whether the distribution behind the token is known already. So the output has the base model's distribution, and with the same
    random numbers it is the same text. (Typical acceptance, as in the Medusa paper, is not lossless, and not here.)

    Args:
        tree: the tree that was verified.
        node_ids: token of every node, the root first.  # [N]
        draw: the next token behind a node; called for accepted nodes only, the root first.

    Returns:
        Accepted node indices, the root first, and the token that was drawn behind each.  # [1 .. depth + 1], twice
    """
    path, tokens = [0], [draw(0)]
    for node, (parent, token) in enumerate(zip(tree.parent_list, node_ids[1:].tolist(), strict=True), start=1):
        if parent == path[-1] and token == tokens[-1]:
            path.append(node)
            tokens.append(draw(node))
    return np.array(path, dtype=np.int64), tokens
