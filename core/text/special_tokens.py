"""Special tokens spelled out in a user's text stay text: only those of the chat template become tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from medusa_export.core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]


def encode_rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], render: Callable[[Messages], str]
) -> list[int]:
    """Token ids of a conversation.

    Where a message spells a special token, a mark that nothing else has is put into it before the template is rendered. The text is
    then split at the special tokens that are left, which are the template's, and what lies between them is encoded as plain text.

    Args:
        render: the chat template.

    Raises:
        ConfigError: a tokenizer that cannot be used that way, and a message that spells special tokens.
    """
    pattern = _pattern(
        tokenizer
    )  # rendered first, then encoded: what apply_chat_template makes of both differs by release
    conversation = [dict(message) for message in messages]
    text = render(conversation)
    if pattern is None or not any(pattern.search(message["content"]) for message in conversation):
        return token_ids(tokenizer, text)
    if _pieces(tokenizer, pattern, text, "") != token_ids(tokenizer, text):  # it strips or prefixes at special tokens
        raise ConfigError("text", "special tokens of the model in it", "plain text", "spell them in another way")
    mark = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)  # private use
    for message in conversation:
        message["content"] = pattern.sub(lambda found: f"{found[0][0]}{mark}{found[0][1:]}", message["content"])
    return _pieces(tokenizer, pattern, render(conversation), mark)


def _pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Finds special tokens, the longest first."""
    found = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = sorted((name for name in found if len(name) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names))) if names else None


def _pieces(tokenizer: PreTrainedTokenizerBase, pattern: re.Pattern[str], text: str, mark: str) -> list[int]:
    """The ids of special tokens and of the plain text between them."""
    known = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    ids, at = [], 0
    for found in pattern.finditer(text):
        ids += [*_encode_plain(tokenizer, text[at : found.start()], mark), known[found[0]]]
        at = found.end()
    return ids + _encode_plain(tokenizer, text[at:], mark)


def _encode_plain(tokenizer: PreTrainedTokenizerBase, text: str, mark: str) -> list[int]:
    text = text.replace(mark, "") if mark else text
    return token_ids(tokenizer, text, split_special_tokens=True) if text else []


def token_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False, **options: bool
) -> list[int]:
    """Token ids of a text.

    Args:
        options: of the tokenizer.

    Raises:
        ConfigError: a text that the tokenizer has no tokens for, as without an unknown token.
    """
    try:
        ids = tokenizer(text, add_special_tokens=add_special_tokens, **options)["input_ids"]
    except Exception as error:  # the tokenizers library raises bare Exceptions
        where = f"{tokenizer.name_or_path} tokenizer"
        raise ConfigError(where, f"no tokens for the text ({error})", "tokens", "change the text") from error
    return [int(token) for token in ids]
