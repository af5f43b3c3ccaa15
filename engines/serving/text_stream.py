"""Tokens into text as they come: never half a character, never a stop word or what may become one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # what tokenizers write for bytes that are no whole character yet


class TextStream:
    """The text of one answer. All pieces together are what decoding all tokens at once gives, up to the stop word.

    Args:
        tokenizer: of the model.
        stop: words that end the text and are not part of it.
        min_tokens: stop words are looked for in what comes after so many tokens.

    Attributes:
        offset: characters before the next token's text, with what is held back. All tokens of one character have the same.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self.is_stopped, self.offset = False, 0
        self._min_tokens, self._length = min_tokens, 0  # characters that were decoded
        self._tokenizer, self._stop = tokenizer, [word for word in stop if word]
        self._tokens: list[int] = []
        # A token's text depends on those before it. What is decoded begins where text ended before: never within a character.
        self._start = self._read = 0
        self._held = ""  # text that may be the beginning of a stop word

    def feed(self, token: int) -> str:
        """The text that a token adds and that is certain by now. After a stop word nothing more comes."""
        if self.is_stopped:
            return ""
        self._tokens.append(token)
        return self._cut(self._new_text(), is_last=False)

    def finish(self) -> str:
        """What was held back; call it when no more tokens come."""
        if self.is_stopped:
            return ""
        rest = self._decode(self._start, None)[len(self._decode(self._start, self._read)) :]
        self._read = len(self._tokens)
        return self._cut(rest, is_last=True)

    def _new_text(self) -> str:
        """Text of the tokens that are not in the text yet; empty while they end within a character."""
        before, now = self._decode(self._start, self._read), self._decode(self._start, None)
        if now.endswith(INCOMPLETE) or len(now) <= len(before):  # within a character, or a token without text
            self.offset = self._length + max(len(now.rstrip(INCOMPLETE)) - len(before), 0)
            return ""
        self._start, self._read = self._read, len(self._tokens)
        self._length += len(now) - len(before)
        self.offset = self._length
        return now[len(before) :]

    def _decode(self, start: int, end: int | None) -> str:
        return str(self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True))

    def _cut(self, text: str, *, is_last: bool) -> str:
        if len(self._tokens) <= self._min_tokens:
            return text
        text = self._held + text
        found = [at for word in self._stop if (at := text.find(word)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        held = 0 if is_last else max((_overlap(text, word) for word in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of a text that is the beginning of a word."""
    return next((size for size in range(min(len(text), len(word) - 1), 0, -1) if word.startswith(text[-size:])), 0)
