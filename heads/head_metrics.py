"""What heads get right on held-out answers: the rank of every true token, and from the ranks accuracies and tokens per step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from medusa_export.heads.head_module import MedusaHeads
from medusa_export.heads.hidden_cache import NO_LABEL, Rows
from medusa_export.heads.search import grow
from medusa_export.heads.tree import Choice, Tree

TOP_K = 10
ABSENT = TOP_K  # the rank of a token that is not among the first TOP_K, and of what is behind the end of an answer
CHUNK_ROWS = 128
TREE_NODES = 8  # draft nodes of the tree that a training reports tokens per step for

Ranks = npt.NDArray[np.int64]


def head_ranks(heads: MedusaHeads, rows: Rows, *, limit: int | None = None) -> Ranks:
    """Rank of the true token in every head's prediction over the whole vocabulary.

    Args:
        limit: only the first so many rows.

    Returns:
        0 .. TOP_K - 1; ABSENT for a worse one and -1 where there is no label.  # int64 [N, num_heads]
    """
    count = len(rows) if limit is None else min(limit, len(rows))
    labels = rows.labels(heads.num_heads)[:count]
    ranks = np.full((count, heads.num_heads), -1, dtype=np.int64)
    device = heads.lm_head.device
    with torch.inference_mode():
        for start in range(0, count, CHUNK_ROWS):
            index = torch.arange(start, min(start + CHUNK_ROWS, count))
            hidden = rows.read(index).to(device)
            for head in range(heads.num_heads):
                valid = labels[index, head] != NO_LABEL
                label = labels[index, head].clamp_min(0).to(device)[:, None]
                logits = heads(hidden, head) @ heads.projection(head).T  # [R, V]
                better = (logits > logits.gather(1, label)).sum(-1).clamp_max(ABSENT).cpu()
                ranks[start : start + CHUNK_ROWS, head] = torch.where(valid, better, -1).numpy()
    return ranks


def accuracies(ranks: Ranks) -> list[dict[str, float]]:
    """For every head the share of positions at which the true token is among the best 1, 2, ... TOP_K."""
    found = []
    for column in ranks.T:
        valid = column[column >= 0]
        found.append({f"top{k}": float((valid < k).mean()) if len(valid) else 0.0 for k in range(1, TOP_K + 1)})
    return found


def tokens_per_step(tree: Tree, ranks: Ranks, answers: npt.NDArray[np.int64]) -> float:
    """Tokens that a step yields when every answer is decoded with the tree: the walk that an engine takes, without the engine.

    Args:
        ranks: as :func:`head_ranks` gives them.  # [N, H]
        answers: number of the answer of each row.  # [N]
    """
    depths = _accepted(tree, ranks) + 1  # tokens of a step that starts at this row
    ends = np.flatnonzero(np.diff(answers, append=answers[-1:] + 1)) + 1
    tokens, steps, row = 0, 0, 0
    for end in ends[ends <= len(ranks)].tolist():
        while row < end - 1:  # the step from the last row would yield what comes after the answer
            steps += 1
            tokens += min(int(depths[row]), end - 1 - row)
            row += int(depths[row])
        row = end
    return tokens / steps if steps else 1.0


def best_tree(ranks: Ranks, nodes: int = TREE_NODES) -> Tree:
    """The tree of so many draft nodes that most often holds the true path: the joint frequencies, no independence assumed."""
    return Tree.from_choices(islice(grow(path_counts(ranks)), nodes))


def path_counts(ranks: Ranks) -> dict[Choice, int]:
    """How often the true continuation is this path of ranks, for every path that was seen."""
    counts: dict[Choice, int] = {}
    for row in ranks.tolist():
        path: Choice = ()
        for rank in row:
            if not 0 <= rank < TOP_K:
                break
            path = (*path, rank)
            counts[path] = counts.get(path, 0) + 1
    return counts


def acceptance(ranks: Ranks, answers: npt.NDArray[np.int64]) -> dict[str, Any]:
    """``acceptance.json``: positions, accuracy of every head, counts of the true paths, and the best small tree with its yield."""
    tree = best_tree(ranks)
    counts = sorted(path_counts(ranks).items(), key=lambda item: (-item[1], item[0]))
    return {
        "positions": len(ranks),
        "heads": accuracies(ranks),
        "paths": [{"choice": list(path), "count": count} for path, count in counts],
        "tree": {
            "choices": [list(choice) for choice in tree.choices],
            "tokens_per_step": tokens_per_step(tree, ranks, answers),
        },
    }


def _accepted(tree: Tree, ranks: Ranks) -> npt.NDArray[np.int64]:
    """Length of the longest path of the tree that is the true one, at every row.  # [N, H] -> [N]"""
    paths: set[Choice] = set(tree.choices)
    found = np.zeros(len(ranks), dtype=np.int64)
    for row, line in enumerate(ranks.tolist()):
        depth = 0
        while depth < len(line) and tuple(line[: depth + 1]) in paths:
            depth += 1
        found[row] = depth
    return found


def mean_accuracy(found: Sequence[dict[str, float]]) -> float:
    """Mean top-1 accuracy over the heads, weighted 0.8 ** head: what early stopping looks at."""
    weights = [0.8**head for head in range(len(found))]
    return sum(w * head["top1"] for w, head in zip(weights, found, strict=True)) / sum(weights)
