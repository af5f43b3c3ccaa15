"""Greedy acceptance of a verified tree: lossless, and the only acceptance in this project (Medusa, arXiv 2401.10774, 2.3)."""

from __future__ import annotations

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
    path = [0]
    wanted = argmax_ids[0]
    for node, (parent, token) in enumerate(zip(tree.parent_list, node_ids[1:].tolist(), strict=True), start=1):
        if parent == path[-1] and token == wanted:
            path.append(node)
            wanted = argmax_ids[node]
    return np.array(path, dtype=np.int64)
