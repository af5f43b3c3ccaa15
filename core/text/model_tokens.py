"""Which tokens end a model's answers, and which ids it may say at all: by its configuration, tokenizer and chat template."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "answer"


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the chat template puts behind an assistant's answer; None without a template, or where it puts none."""
    if not tokenizer.chat_template:
        return None
    conversation = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _MARK}]
    try:
        text = str(tokenizer.apply_chat_template(conversation, tokenize=False))
    except Exception:  # a template that takes no answers has no end of its own; what it takes, encode_chat finds out
        return None
    tokens = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    names = sorted((name for name in tokens if name.strip()), key=len, reverse=True)
    behind = text.rpartition(_MARK)[2].lstrip()
    found = re.match("|".join(map(re.escape, names)), behind) if names else None
    return tokens[found[0]] if found else None


@dataclass(frozen=True)
class ModelTokens:
    """What is to be known of a model's token ids.

    Attributes:
        ends: tokens that end an answer, the one that the model has learnt to end a turn with first.
        count: ids from 0 on that the tokenizer knows; rows of the embedding behind them mean nothing.
    """

    ends: tuple[int, ...]
    count: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, configured: Iterable[int], *, vocab_size: int) -> ModelTokens:
        """Of a model and its tokenizer.

        Args:
            configured: end tokens of generation_config.json and config.json.
            vocab_size: rows of the embedding; a tokenizer may have tokens beyond them, which the model cannot say.
        """
        known = min(vocab_size, 1 + max(tokenizer.get_vocab().values(), default=-1))
        candidates = (end_of_turn(tokenizer), *configured, tokenizer.eos_token_id)
        ends = dict.fromkeys(token for token in candidates if token is not None and 0 <= token < known)
        return cls(tuple(ends), known)


def describe_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Tokens as a person reads them: ``<|im_end|> (id 2), <|endoftext|> (id 0)``."""
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(token)} (id {token})" for token in tokens)
