"""Acceptance of a verified tree: greedy or drawn, which are lossless, or typical, which is not (Medusa, arXiv 2401.10774, 2.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medusa_export.heads.decoding.sampling import Sampler
from medusa_export.heads.trees.tree import Tree

Path = npt.NDArray[np.int64]


def accept_greedy(
    tree: Tree, node_ids: npt.NDArray[np.int64], argmax_ids: npt.NDArray[np.int64]
) -> tuple[Path, list[int]]:
    """The longest path from the root on which every draft token is what the base model would have chosen itself.

    Args:
        tree: the tree that was verified.
        node_ids: token of every node, the root first.  # [N]
        argmax_ids: the base model's greedy next token after every node.  # [N]

    Returns:
        As :func:`accept_drawn`.
    """
    next_ids = argmax_ids.tolist()
    return accept_drawn(tree, node_ids, next_ids.__getitem__)


def accept_drawn(tree: Tree, node_ids: npt.NDArray[np.int64], draw: Callable[[int], int]) -> tuple[Path, list[int]]:
    """The path that tokens take through the tree when each is drawn from the base model's distribution behind the one before it.

    Every token is drawn once, in order, from what plain sampling would draw it from, whatever was drafted; a draft only decides
    whether the distribution behind the token is known already. So the output has the base model's distribution, and with the same
    random numbers it is the same text. Where several siblings carry the token, the text goes on below any of them: they stand for
    the same text, and the longest path wins.

    Args:
        tree: the tree that was verified.
        node_ids: token of every node, the root first.  # [N]
        draw: the next token behind a node; called once for every accepted token, the root first.

    Returns:
        Accepted node indices, the root first, and the token that was drawn behind each.  # [1 .. depth + 1], twice
        All but the last of the tokens are those of the nodes; the last one is the next step's root.
    """
    tokens, ids = [draw(0)], node_ids.tolist()
    reached = [node for node in tree.children[0] if ids[node] == tokens[0]]
    node = 0
    while reached:
        node = reached[0]
        tokens.append(draw(node))
        reached = [child for twin in reached for child in tree.children[twin] if ids[child] == tokens[-1]]
    return tree.path_to(node), tokens


@dataclass(frozen=True)
class Typical:
    """Typical acceptance: a draft stands if the base model finds it likely enough, whatever it would have drawn. NOT lossless.

    The threshold behind a node is ``min(threshold, alpha * exp(-entropy))`` (section 2.3.1; FasterDecoding's posterior_threshold and
    posterior_alpha, with its defaults).
    """

    threshold: float = 0.09
    alpha: float = 0.3


def accept_typical(
    tree: Tree, node_ids: npt.NDArray[np.int64], logits: npt.NDArray[np.float32], sampler: Sampler, rule: Typical
) -> tuple[Path, list[int]]:
    """The longest path whose drafts are all likely enough behind their parents; of equally long ones the likeliest.

    The output does not have the base model's distribution: likely tokens come more often.

    Args:
        tree: the tree that was verified.
        node_ids: token of every node, the root first.  # [N]
        logits: of the base model behind every node.  # [N, vocab_size]
        sampler: its temperature, and what draws the token behind the path.
        rule: what is likely enough.

    Returns:
        As :func:`accept_drawn`, but all tokens except the last are drafts that stood.
    """
    scaled = logits.astype(np.float64) / sampler.temperature
    scaled -= scaled.max(-1, keepdims=True)
    log_shares = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))  # [N, V]
    entropy = -(np.exp(log_shares) * log_shares).sum(-1)  # [N], nats
    thresholds = np.log(np.minimum(rule.threshold, rule.alpha * np.exp(-entropy)))  # [N]
    best = {0: (0, 0.0)}  # accepted node -> depth and log-probability of its path
    for node, parent in enumerate(tree.parent_list, start=1):
        share = log_shares[parent, node_ids[node]]
        if parent in best and share > thresholds[parent]:
            depth, likelihood = best[parent]
            best[node] = depth + 1, likelihood + share
    path = tree.path_to(max(best, key=lambda node: (best[node], -node)))
    return path, [*node_ids[path[1:]].tolist(), sampler.draw(logits[path[-1]])]
