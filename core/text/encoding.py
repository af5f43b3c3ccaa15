"""Text to token ids: the one place where it happens, for every command and every server.

Repositories for TensorRT-LLM hold a copy of this file, of ``special_tokens`` and of ``core.errors``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from medusa_export.core.errors import ConfigError
from medusa_export.core.text.special_tokens import encode_rendered, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], *, opens_answer: bool = True
) -> list[int]:
    """Token ids of a conversation in the model's chat template, up to where the assistant's answer starts.

    The template says what begins a text, so that the tokenizer adds nothing; special tokens that a message spells stay text.

    Args:
        tokenizer: of the model.
        messages: with ``role`` and ``content``.
        opens_answer: whether what begins an answer comes last.

    Raises:
        ConfigError: the tokenizer has no chat template, or the template refuses these messages.
    """
    if not tokenizer.chat_template:
        action = "pass --chat-template FILE to medusa-export, medusa-data, medusa-train or medusa-serve"
        raise ConfigError(str(tokenizer.name_or_path), "no chat template", "one, in Jinja", action)

    def render(conversation: list[dict[str, str]]) -> str:
        try:
            return str(tokenizer.apply_chat_template(conversation, add_generation_prompt=opens_answer, tokenize=False))
        except Exception as error:  # a template computes, so it can fail in every way that Python can
            raise ConfigError(
                f"{tokenizer.name_or_path} chat template",
                f"a refusal ({error})",
                "messages it takes",
                "change the prompts",
            ) from error

    return encode_rendered(tokenizer, messages, render)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, *, adds_special: bool = True) -> list[int]:
    """Token ids of a text that a model goes on from, with what its tokenizer adds, such as the token that begins a text.

    Special tokens spelled out in it count as such: the caller writes the whole text.

    Args:
        tokenizer: of the model.
        text: as a whole.
        adds_special: whether the tokenizer adds anything.
    """
    return token_ids(tokenizer, text, add_special_tokens=adds_special)
