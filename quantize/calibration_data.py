"""Token batches for calibration, from chat prompts."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from medusa_export.core.errors import ConfigError
from medusa_export.core.text.encoding import encode_chat
from medusa_export.core.text.prompts import Prompt
from medusa_export.core.text.special_tokens import token_ids

# ModelOpt's examples use 512 prompts; per-tensor maxima settle long before that, and every pass costs the same again.
DEFAULT_PROMPTS = 32
DEFAULT_MAX_LENGTH = 512  # tokens


def token_batches(
    tokenizer: Any,
    prompts: Iterable[Prompt],
    *,
    max_prompts: int = DEFAULT_PROMPTS,
    max_length: int = DEFAULT_MAX_LENGTH,
) -> list[list[int]]:
    """The first conversations as token ids, answers included where the file has them: the same input always gives the same batches.

    Args:
        tokenizer: the model's tokenizer, whose chat template formats every prompt.
        prompts: conversations; more than ``max_prompts`` are not read.
        max_prompts: how many to take.
        max_length: tokens kept of each, from its start.

    Returns:
        One list of ids a prompt; prompts are not padded or joined.

    Raises:
        ConfigError: no prompts at all, or limits below 1.
    """
    if max_prompts < 1 or max_length < 1:
        raise ConfigError(
            "calibration", f"{max_prompts} prompts of {max_length} tokens", "at least 1 of each", "raise it"
        )
    encoded = [encode_conversation(tokenizer, prompt)[:max_length] for prompt in islice(prompts, max_prompts)]
    batches = [ids for ids in encoded if ids]
    if not batches:
        raise ConfigError("calibration prompts", "none with tokens", "at least one", "give a file with --calib")
    return batches


def encode_conversation(tokenizer: Any, prompt: Prompt) -> list[int]:
    """A prompt under the chat template, and its answer after it."""
    answer = token_ids(tokenizer, prompt.answer) if prompt.answer else []
    return [*encode_chat(tokenizer, prompt.messages), *answer]
