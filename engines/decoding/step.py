"""One decode step, of one sequence or of many: verify what was drafted, accept, commit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from medusa_export.engines.decoding.protocols import StepDecoder
from medusa_export.heads.decoding.accept import Typical, accept_drawn, accept_greedy, accept_typical
from medusa_export.heads.decoding.sampling import Sampler
from medusa_export.heads.decoding.token_choice import TokenChooser
from medusa_export.heads.trees.tree import Tree

PREFILL = 256  # prompt tokens a run: bounds the memory of scores
ROOT = Tree(())


def decode_step(
    decoder: StepDecoder,
    tree: Tree,
    node_ids: npt.NDArray[np.int64],
    samplers: Sequence[Sampler | TokenChooser | None] = (),
    typical: Typical | None = None,
) -> list[list[int]]:
    """One step of every active sequence: verify, accept, commit; whoever drafted.

    Args:
        tree: one for all sequences; each needs room for its nodes.
        node_ids: their tokens; the root's is the newest of its sequence, which no cache holds yet.  # [active, N]
        samplers: what draws or chooses the tokens of each; None, or none at all: greedy.
        typical: where tokens are drawn, let drafts stand by this rule instead: not lossless.

    Returns:
        The new tokens of each: accepted drafts and the base model's own next one.
    """
    if any(samplers):
        logits = decoder.verify_logits(tree, node_ids)  # [active, N, V]
        accepted = [
            _accept(tree, *row, typical=typical) for row in zip(node_ids, logits, samplers, strict=True)
        ]  # fmt: skip
    else:
        next_ids = decoder.verify(tree, node_ids)  # [active, N]
        accepted = [accept_greedy(tree, *row) for row in zip(node_ids, next_ids, strict=True)]
    decoder.commit([path for path, _ in accepted])
    return [tokens for _, tokens in accepted]


def _accept(
    tree: Tree,
    node_ids: npt.NDArray[np.int64],
    logits: npt.NDArray[np.float32],
    sampler: Sampler | TokenChooser | None,
    *,
    typical: Typical | None,
) -> tuple[npt.NDArray[np.int64], list[int]]:
    """Path and tokens of a sequence whose logits are known.  # [N], [N, V]"""
    if sampler is None:
        return accept_greedy(tree, node_ids, logits.argmax(-1))
    if typical and isinstance(sampler, Sampler):
        return accept_typical(tree, node_ids, logits, sampler, typical)
    return accept_drawn(tree, node_ids, lambda node: sampler.draw(logits[node]))
