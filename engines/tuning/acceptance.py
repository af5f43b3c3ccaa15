"""What heads get right along an engine's own greedy answers: one autoregressive pass, with every head drafting at every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from medusa_export.core.errors import ConfigError
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE, StepEngine
from medusa_export.heads.trees.acceptance import ABSENT, TOP_K, UNKNOWN, Answer, Ranks
from medusa_export.heads.trees.prompt_lookup import accepted_lengths


def measure_acceptance(
    engine: StepEngine,
    prompts: Sequence[tuple[str, str, list[int]]],
    *,
    max_new_tokens: int,
    progress: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """Record the rank of every true token in every head, and what prompt lookup would have got right.

    Args:
        prompts: (id, category, input_ids).

    Raises:
        ConfigError: an engine without heads.
    """
    if not engine.info.max_depth:
        raise ConfigError("engine", "no Medusa heads", "an engine with heads", "export with --heads")
    answers = []
    for key, category, input_ids in prompts:
        tokens, ranks = _follow(engine, input_ids, max_new_tokens)
        answers.append(Answer(key, category, ranks, accepted_lengths(input_ids, tokens)))
        progress()
    return answers


def trace(engine: StepEngine, input_ids: Sequence[int], *, max_new_tokens: int) -> Ranks:
    """One answer's ranks, see :class:`~medusa_export.heads.trees.acceptance.Answer`.  # [T, max_depth]

    Args:
        engine: what answers.
        input_ids: the prompt.
        max_new_tokens: most tokens of the answer.
    """
    return _follow(engine, input_ids, max_new_tokens)[1]


def _follow(engine: StepEngine, input_ids: Sequence[int], max_new_tokens: int) -> tuple[list[int], Ranks]:
    """The answer's tokens, and its ranks."""
    step, ends = engine.prepare(AUTOREGRESSIVE), set(engine.info.eos_token_ids)
    tokens, drafts = [engine.prefill(input_ids)], []
    while len(tokens) < max_new_tokens and tokens[-1] not in ends and engine.length < engine.info.max_length:
        drafts.append(engine.draft(engine.info.max_depth)[:, :TOP_K].copy())
        tokens.append(int(step.verify(np.array(tokens[-1:]))[0]))
        step.commit(np.zeros(1, dtype=np.int64))
    ranks = np.full((len(tokens), engine.info.max_depth), UNKNOWN, dtype=np.int64)
    for row, draft in enumerate(drafts):
        for head, token in enumerate(tokens[row + 1 : row + 1 + len(draft)]):
            places = np.flatnonzero(draft[head] == token)
            ranks[row, head] = places[0] if len(places) else ABSENT
    return tokens, ranks
