"""The rank of every true token in what Medusa heads predict on cached hidden states; what follows from ranks is in ``acceptance``."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from medusa_export.heads.training.head_module import MedusaHeads
from medusa_export.heads.training.hidden_states import NO_LABEL, Rows
from medusa_export.heads.trees.acceptance import ABSENT, TOP_K, UNKNOWN, Ranks

CHUNK_ROWS = 128


def head_ranks(heads: MedusaHeads, rows: Rows, *, limit: int | None = None) -> Ranks:
    """Rank of the true token in every head's prediction over the whole vocabulary.

    Args:
        limit: use only the first N rows.

    Returns:
        0 .. TOP_K - 1; ABSENT for a worse one and UNKNOWN where there is no label.  # int64 [N, num_heads]
    """
    count = len(rows) if limit is None else min(limit, len(rows))
    labels = rows.labels(heads.num_heads)[:count]
    ranks = np.full((count, heads.num_heads), UNKNOWN, dtype=np.int64)
    for index, head, logits in _predictions(heads, rows, count):
        valid = labels[index, head] != NO_LABEL
        label = labels[index, head].clamp_min(0).to(logits.device)[:, None]
        better = (logits > logits.gather(1, label)).sum(-1).clamp_max(ABSENT).cpu()
        ranks[index, head] = torch.where(valid, better, UNKNOWN).numpy()
    return ranks


def head_candidates(heads: MedusaHeads, rows: Rows, *, limit: int) -> npt.NDArray[np.int64]:
    """The best tokens of every head over the whole vocabulary, best first, for the first ``limit`` rows.

    Args:
        heads: what predicts.
        rows: cached states.
        limit: rows, at most.

    Returns:
        TOP_K of them, or all of a smaller vocabulary.  # int64 [N, num_heads, TOP_K]
    """
    count = min(limit, len(rows))
    top_k = min(TOP_K, heads.lm_head.shape[0])
    found = np.empty((count, heads.num_heads, top_k), dtype=np.int64)
    for index, head, logits in _predictions(heads, rows, count):
        found[index, head] = logits.topk(top_k).indices.cpu().numpy()
    return found


def _predictions(heads: MedusaHeads, rows: Rows, count: int) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
    """Row numbers, head and logits [R, vocab_size], for some of the first ``count`` rows at a time.

    Args:
        heads: what predicts.
        rows: cached states.
        count: rows, all of which are there.
    """
    for start in range(0, count, CHUNK_ROWS):
        index = torch.arange(start, min(start + CHUNK_ROWS, count))
        hidden = rows.read(index).to(heads.lm_head.device)
        for head in range(heads.num_heads):
            with torch.inference_mode():  # not around the yield: it would hold in the caller too
                logits = heads(hidden, head) @ heads.projection(head).T
            yield index, head, logits
