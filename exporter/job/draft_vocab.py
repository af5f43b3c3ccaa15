"""The tokens that the heads' projection is restricted to on a CPU: drafts are verified, so a rare token costs a miss, no error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from medusa_export.core.text.special_tokens import token_ids

if TYPE_CHECKING:
    import torch

    from medusa_export.core.text.prompts import Prompt

DEFAULT_SIZE = 8192


def most_frequent_tokens(
    tokenizer: Any, prompts: Iterable[Prompt], *, size: int, vocab_size: int, ends: Sequence[int] = ()
) -> torch.Tensor:
    """The ``size`` most frequent tokens of the answers (of the questions where there are none), most frequent first.

    What the texts do not fill is filled with the lowest ids, which byte-pair encoding gives to its most frequent merges.

    Args:
        vocab_size: ids from 0 on that may be drafted.
        ends: tokens that end an answer; the first counts once an answer, and none is left out for its rarity.

    Returns:
        int64 token ids.  # [min(size, vocab_size)]
    """
    import torch

    counts: Counter[int] = Counter(dict.fromkeys(ends, 0))
    for prompt in prompts:
        text = prompt.answer or prompt.messages[-1]["content"]
        counts.update(token_ids(tokenizer, text))
        counts.update(ends[:1])
    ranked = [token for token, _ in counts.most_common() if token < vocab_size]
    seen = set(ranked)
    ranked += (token for token in range(vocab_size) if token not in seen)
    return torch.tensor(ranked[:size], dtype=torch.int64)
