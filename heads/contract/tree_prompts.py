"""Which prompts a tree is measured on: an export refuses what nothing can be measured on before it writes an engine."""

from __future__ import annotations

from collections.abc import Sequence

from medusa_export.core.errors import ConfigError

MAX_PROMPTS, NEW_TOKENS = 64, 96  # prompts, and the most tokens of their answers


def prompts_to_run(lengths: Sequence[int], max_length: int) -> list[int]:
    """Indices of up to 64 prompts that leave room for an answer, evenly spread over all that do.

    Args:
        lengths: tokens of each prompt.
        max_length: tokens of prompt and answer together.

    Raises:
        ConfigError: none fits.
    """
    longest = max_length - NEW_TOKENS
    if longest < 1:
        expected = f"{NEW_TOKENS + 1} or more, for a prompt and the {NEW_TOKENS} tokens of its answer"
        raise ConfigError("--tree auto", f"a context of {max_length} tokens", expected, "raise --max-length")
    fitting = [index for index, length in enumerate(lengths) if length <= longest]
    if not fitting:
        got, limit = f"prompts of {min(lengths, default=0)} tokens and more", f"one of at most {longest}"
        raise ConfigError("--tree auto", got, limit, "raise --max-length or shorten them")
    return fitting[:: -(-len(fitting) // MAX_PROMPTS)]
