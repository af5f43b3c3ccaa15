"""Answers that follow a grammar: llguidance says which tokens may come next, and the others are never chosen."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from medusa_export.core.errors import ConfigError, missing_package
from medusa_export.heads.decoding.token_choice import Scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REASON_LENGTH = 200  # characters; clients read it
# Between the tokens of JSON: JSON allows any amount, and small models love to write nothing else for ever.
JSON_OPTIONS: Any = {"whitespace_pattern": r"[ \n\t]{0,12}"}


class GrammarError(ConfigError):
    """A grammar that no text of this model follows, or that the matcher gave up on: the client's to change."""


@dataclass(frozen=True)
class Grammar:
    """What an answer has to look like.

    Attributes:
        where: the request's field that says so.
        schema: a JSON schema; or
        lark: a grammar in llguidance's variant of Lark.
    """

    where: str
    schema: Mapping[str, Any] | None = None
    lark: str = ""


class GrammarRule:
    """Permits the tokens that a grammar allows. A :class:`~medusa_export.heads.decoding.token_choice.TokenRule`.

    Args:
        matcher: llguidance's.
        where: the request's field that has the grammar.
    """

    def __init__(self, matcher: Any, where: str) -> None:
        self.matcher, self._where = matcher, where

    def apply(self, scores: Scores) -> None:
        permitted = np.frombuffer(self.matcher.compute_logit_bias(), np.uint8)  # [tokenizer's vocabulary]
        self._require()
        scores[: len(permitted)][permitted[: len(scores)] == 0] = -np.inf
        scores[len(permitted) :] = -np.inf

    def take(self, token: int) -> None:
        if not self.matcher.is_stopped():  # behind the end of sequence: tokens that the answer does not take
            self.matcher.consume_token(token)
            self._require()

    def _require(self) -> None:
        if self.matcher.is_error():
            reason = _in_brief(self.matcher.get_error())
            raise GrammarError(
                self._where, f"a matcher that gave up ({reason})", "one that goes on", "use a simpler schema"
            )


class GrammarCompiler:
    """Makes rules for one tokenizer; llguidance is loaded with the first one.

    Args:
        vocab_size: of the logits, which may be more than the tokenizer has.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, list(eos_token_ids)
        self._lock = threading.Lock()
        self._made: Any = None

    def rule(self, grammar: Grammar) -> GrammarRule:
        """A rule for one answer. From any thread.

        Raises:
            ConfigError: a grammar that llguidance does not take; it says why.
            MissingPackageError: no llguidance.
        """
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise missing_package("llguidance", "serve") from error
        if not self._eos:
            got = "a model without an end of sequence"
            raise ConfigError(grammar.where, got, "one whose answers can end where a grammar does", "leave it out")
        text = grammar.lark
        if grammar.schema is not None:
            try:
                text = LLMatcher.grammar_from_json_schema(json.dumps(grammar.schema), overrides=JSON_OPTIONS)
            except (
                ValueError,
                RecursionError,
            ) as error:  # no JSON to llguidance: half a surrogate pair, nested too deeply
                raise _refused(grammar, str(error)) from error
        with self._lock:
            if self._made is None:
                self._made = _ll_tokenizer(self._tokenizer, self._vocab_size, self._eos)
        matcher = LLMatcher(self._made, text, log_level=0)
        if matcher.is_error():
            raise _refused(grammar, matcher.get_error())
        return GrammarRule(matcher, grammar.where)


def _refused(grammar: Grammar, reason: str) -> ConfigError:
    got = f"a schema that cannot be followed ({_in_brief(reason)})"
    return ConfigError(grammar.where, got, "another one", "simplify it")


def _in_brief(reason: str) -> str:
    """A reason of llguidance in one line, without the grammar that it quotes. Behind a pattern stands what is wrong with it."""
    said = " ".join(re.split(r"\n\s*\d+ \| ", reason)[0].split())
    return said if len(said) <= REASON_LENGTH else f"{said[: REASON_LENGTH // 2]} ... {said[-REASON_LENGTH // 2 :]}"


def _ll_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: list[int]) -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return LLTokenizer(
        TokenizerWrapper(_Bytes(tokenizer, vocab_size, eos_token_ids, sorted(special | set(eos_token_ids)))), eos_token=eos_token_ids
    )  # fmt: skip


class _Bytes:
    """A tokenizer as llguidance wants one: the bytes of every token.

    Its own reader of tokenizer.json looks for one kind of decoder and is wrong where there are several, as in tokenizers that
    transformers reads from GGUF files.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: list[int], special: list[int]
    ) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id, self.special_token_ids = eos_token_ids[0], None, special
        self.tokens = list(token_bytes(tokenizer, vocab_size))

    def __call__(self, text: bytes | str) -> list[int]:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return [int(token) for token in self._tokenizer(text, add_special_tokens=False)["input_ids"]]


def token_bytes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Iterator[bytes]:
    """The bytes that each token stands for in an answer; none for numbers that are no token.

    Byte-level tokenizers spell bytes in letters of their own, others spell spaces as U+2581 and lone bytes as <0x0A>.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str())["decoder"] if backend is not None else None
    letters = _byte_letters() if '"ByteLevel"' in json.dumps(decoder) else {}
    known = {name: number for name, number in tokenizer.get_vocab().items() if number < vocab_size}
    names = {number: name for name, number in known.items()}
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    for number in range(vocab_size):
        name = names.get(number, "")
        if number in added:
            yield added[number].encode()
        elif letters:
            yield b"".join(bytes([letters[char]]) if char in letters else char.encode() for char in name)
        elif lone := re.fullmatch("<0x([0-9A-F]{2})>", name):
            yield bytes([int(lone[1], 16)])
        else:
            yield name.replace("\u2581", " ").encode()


def _byte_letters() -> dict[str, int]:
    """The letter that byte-level tokenizers write for each byte (GPT-2's bytes_to_unicode): printable ones for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [number for number in range(256) if number not in printable]
    return {chr(number): number for number in printable} | {chr(256 + at): number for at, number in enumerate(others)}
