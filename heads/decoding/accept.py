"""Acceptance of a verified tree: greedy or drawn, which are lossless, or typical, which is not (Medusa, arXiv 2401.10774, 2.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medusa_export.heads.trees.tree import Tree


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
    random numbers it is the same text.

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


@dataclass(frozen=True)
class Typical:
    """Typical acceptance: a draft stands if the base model finds it likely enough, whatever it would have drawn. NOT lossless.

    The threshold behind a node is ``min(threshold, alpha * exp(-entropy))`` (section 2.3.1; FasterDecoding's posterior_threshold and
    posterior_alpha, with its defaults).
    """

    threshold: float = 0.09
    alpha: float = 0.3


def accept_typical(
    tree: Tree, node_ids: npt.NDArray[np.int64], logits: npt.NDArray[np.float32], temperature: float, rule: Typical
) -> npt.NDArray[np.int64]:
    """The longest path whose drafts are all likely enough behind their parents; of equally long ones the likeliest.

    The output does not have the base model's distribution: likely tokens come more often.

    Args:
        node_ids: token of every node, the root first.  # [N]
        logits: of the base model behind every node.  # [N, vocab_size]

    Returns:
        Accepted node indices, the root first.  # [1 .. depth + 1]
    """
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(-1, keepdims=True)
    log_shares = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))  # [N, V]
    entropy = -(np.exp(log_shares) * log_shares).sum(-1)  # [N], nats
    thresholds = np.log(np.minimum(rule.threshold, rule.alpha * np.exp(-entropy)))  # [N]
    best = {0: (0, 0.0)}  # accepted node -> depth and log-probability of its path
    parents = [-1, *tree.parent_list]
    for node in range(1, tree.num_nodes):
        parent = parents[node]
        share = log_shares[parent, node_ids[node]]
        if parent in best and share > thresholds[parent]:
            depth, likelihood = best[parent]
            best[node] = depth + 1, likelihood + share
    path = [max(best, key=lambda node: (best[node], -node))]
    while path[-1]:
        path.append(parents[path[-1]])
    return np.array(path[::-1], dtype=np.int64)
