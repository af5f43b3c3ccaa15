"""What heads get right along an engine's own greedy answers: an autoregressive pass, with every head drafting at every token.

As many answers as the decoder has slots are written at once, so that a step reads its weights once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from medusa_export.core.errors import ConfigError
from medusa_export.engines.decoding.protocols import TreeDecoder
from medusa_export.engines.decoding.step import PREFILL, ROOT, decode_step
from medusa_export.heads.trees.acceptance import ABSENT, TOP_K, UNKNOWN, Answer, Ranks
from medusa_export.heads.trees.prompt_lookup import accepted_lengths

AT_ONCE = 16  # answers; more of them gain little and take memory


def measure_acceptance(
    decoder: TreeDecoder,
    prompts: Sequence[tuple[str, str, list[int]]],
    *,
    max_new_tokens: int,
    progress: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """Record the rank of every true token in every head, and what prompt lookup would have got right.

    Args:
        decoder: what answers, with no sequence in it.
        prompts: (id, category, input_ids).
        max_new_tokens: most tokens of an answer.
        progress: called after every answer.

    Raises:
        ConfigError: an engine without heads, a prompt with a token that the model does not have, or answers of one token only.
    """
    depth, ends = decoder.info.max_depth, set(decoder.info.eos_token_ids)
    if not depth:
        raise ConfigError("engine", "no Medusa heads", "an engine with heads", "export with --heads")
    for _, _, input_ids in prompts:
        decoder.info.require_known(input_ids)
    followed = [_Followed(input_ids) for _, _, input_ids in prompts]
    waiting, active = list(reversed(followed)), list[_Followed]()  # active: by slot
    while waiting or active:
        while waiting and len(active) < decoder.slots:
            active.append(waiting.pop())
            active[-1].tokens.append(_prefill(decoder, active[-1].input_ids))
        for slot in reversed(range(len(active))):
            if active[slot].ends(ends, max_new_tokens) or not decoder.remaining(slot):
                _release(decoder, active, slot)
                progress()
        if active:
            _step(decoder, active, depth)
    if all(len(answer.tokens) < 2 for answer in followed):
        got, expected = "every answer has one token: nothing to count", "answers of two tokens and more"
        raise ConfigError("acceptance", got, expected, "give prompts that are answered at more length")
    return [
        Answer(key, category, found.ranks(depth), accepted_lengths(input_ids, found.tokens))
        for (key, category, input_ids), found in zip(prompts, followed, strict=True)
    ]


@dataclass
class _Followed:
    """An answer and what heads drafted on its way.

    Attributes:
        input_ids: the prompt.
        tokens: of the answer.
        drafts: before every token but the first.  # [depth, TOP_K] each
    """

    input_ids: Sequence[int]
    tokens: list[int] = field(default_factory=list)
    drafts: list[npt.NDArray[np.int64]] = field(default_factory=list)

    def ends(self, eos_token_ids: set[int], max_new_tokens: int) -> bool:
        return len(self.tokens) >= max_new_tokens or self.tokens[-1] in eos_token_ids

    def ranks(self, depth: int) -> Ranks:
        """See :class:`~medusa_export.heads.trees.acceptance.Answer`.  # [T, depth]"""
        ranks = np.full((len(self.tokens), depth), UNKNOWN, dtype=np.int64)
        for row, draft in enumerate(self.drafts):
            for head, token in enumerate(self.tokens[row + 1 : row + 1 + depth]):
                places = np.flatnonzero(draft[head] == token)
                ranks[row, head] = places[0] if len(places) else ABSENT
        return ranks


def _prefill(decoder: TreeDecoder, input_ids: Sequence[int]) -> int:
    """Run a prompt in the next free slot; its greedy first token."""
    decoder.begin(input_ids)
    while (logits := decoder.prefill_chunk(PREFILL)) is None:
        pass
    return int(logits.argmax())


def _step(decoder: TreeDecoder, active: Sequence[_Followed], depth: int) -> None:
    """One token more of every active answer, and the drafts before it."""
    for answer, draft in zip(active, decoder.draft(depth), strict=True):
        answer.drafts.append(draft[:, :TOP_K].copy())
    last = np.array([[answer.tokens[-1]] for answer in active], dtype=np.int64)
    for answer, (token,) in zip(active, decode_step(decoder, ROOT, last), strict=True):
        answer.tokens.append(token)


def _release(decoder: TreeDecoder, active: list[_Followed], slot: int) -> None:
    """End an answer; the last active one moves into its slot, as in the decoder."""
    decoder.release(slot)
    active[slot] = active[-1]
    del active[-1]
