"""Prompts as an engine takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from medusa_export.core.errors import ConfigError
from medusa_export.core.text.encoding import encode_chat
from medusa_export.core.text.prompts import Prompt
from medusa_export.heads.contract.engine_info import EngineInfo

EncodedPrompt = tuple[str, str, list[int]]  # id, category, input_ids


def encode_all(tokenizer: Any, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
    """Prompts through the chat template of an engine's tokenizer, of any length."""
    return [(prompt.id, prompt.category, encode_chat(tokenizer, prompt.messages)) for prompt in prompts]


def encode_prompts(
    tokenizer: Any, info: EngineInfo, prompts: Sequence[Prompt], *, max_new_tokens: int
) -> list[EncodedPrompt]:
    """Prompts as :func:`encode_all` gives them, all of which have to fit.

    Args:
        tokenizer: the engine's.
        info: the engine's context and vocabulary.
        prompts: conversations up to the answer.
        max_new_tokens: tokens that have to fit behind each.

    Raises:
        ConfigError: a prompt that leaves no room for ``max_new_tokens``.
    """
    encoded = encode_all(tokenizer, prompts)
    for key, _, ids in encoded:
        if len(ids) + max_new_tokens > info.max_length:
            got = f"{len(ids)} tokens and {max_new_tokens} new ones"
            action = "drop the prompt, lower --max-new-tokens, or export with a larger --max-length"
            raise ConfigError(f"prompt {key}", got, f"at most {info.max_length} together", action)
    return encoded
