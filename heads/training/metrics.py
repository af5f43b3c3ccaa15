"""The rank of every true token in what Medusa heads predict on cached hidden states; what follows from ranks is in ``acceptance``."""

from __future__ import annotations

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
                ranks[start : start + CHUNK_ROWS, head] = torch.where(valid, better, UNKNOWN).numpy()
    return ranks


def head_candidates(heads: MedusaHeads, rows: Rows, *, limit: int) -> npt.NDArray[np.int64]:
    """The best TOP_K tokens of every head over the whole vocabulary, for the first ``limit`` rows.  # int64 [N, num_heads, TOP_K]

    Args:
        heads: what predicts.
        rows: cached states.
        limit: rows, at most.
    """
    count, device = min(limit, len(rows)), heads.lm_head.device
    found = np.empty((count, heads.num_heads, TOP_K), dtype=np.int64)
    with torch.inference_mode():
        for start in range(0, count, CHUNK_ROWS):
            index = torch.arange(start, min(start + CHUNK_ROWS, count))
            hidden = rows.read(index).to(device)
            for head in range(heads.num_heads):
                logits = heads(hidden, head) @ heads.projection(head).T  # [R, V]
                found[index, head] = logits.topk(TOP_K).indices.cpu().numpy()
    return found
