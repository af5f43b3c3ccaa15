"""One step of several sequences: draft, verify, accept, commit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from medusa_export.engines.decoding.protocols import TreeDecoder
from medusa_export.heads.decoding.accept import accept_drawn, accept_greedy
from medusa_export.heads.decoding.sampling import Sampler
from medusa_export.heads.trees.tree import Tree

PREFILL = 256  # prompt tokens a run: bounds the memory of scores
ROOT = Tree(())


def advance(
    decoder: TreeDecoder, tree: Tree, last: Sequence[int], samplers: Sequence[Sampler | None] | None = None
) -> list[list[int]]:
    """One step of every active sequence: draft, verify, accept, keep.

    Args:
        tree: one for all sequences; each needs room for its nodes.
        last: the newest token of each, which no cache holds yet.
        samplers: what draws the tokens of each; None: greedy.

    Returns:
        The new tokens of each: accepted drafts and the base model's own next one.
    """
    samplers = samplers or [None] * len(last)
    node_ids = np.empty((len(last), tree.num_nodes), dtype=np.int64)
    node_ids[:, 0] = last
    if tree.max_draft_len:
        heads, ranks = tree.heads_and_ranks
        node_ids[:, 1:] = decoder.draft(tree.depth)[:, heads, ranks]
    if any(samplers):
        logits = decoder.verify_logits(tree, node_ids)  # [active, N, V]
        next_ids = logits.argmax(-1)
    else:
        next_ids = decoder.verify(tree, node_ids)  # [active, N]
    paths, tokens = [], []
    for index, sampler in enumerate(samplers):
        rows = node_ids[index], next_ids[index]
        if sampler:
            path, new = accept_drawn(tree, rows[0], partial(_draw, sampler, logits[index]))
        else:
            path = accept_greedy(tree, *rows)
            new = rows[1][path].tolist()
        paths.append(path)
        tokens.append(new)
    decoder.keep(paths)
    return tokens


def _draw(sampler: Sampler, logits: npt.NDArray[np.float32], node: int) -> int:
    """The next token behind a node.  # logits [N, V]"""
    return sampler.draw(logits[node])
