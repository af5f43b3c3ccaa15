"""Pieces of text are whole characters, add up to the whole, and stop at stop words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.serving.text_stream import TextStream

TEXTS = [
    "plain words, twice plain words",
    "naïve café — “quotes”",
    "日本語のテキスト 🎉🇩🇪👩‍👩‍👧 end",
    "\ttabs\n\nlines  ",
]


@pytest.fixture(scope="module")
def bytewise() -> PreTrainedTokenizerFast:
    """Byte-level without merges: a token a byte, so that characters are always split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: index for index, letter in enumerate([*alphabet, "</s>"])}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


@pytest.fixture(scope="module")
def fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: words marked by a leading block, and byte tokens for what is not in the vocabulary."""
    words = ["<unk>", "</s>", "▁", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcdefghijklmnopqrstuvwxyz,"]
    core = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def pieces(tokenizer: Any, ids: list[int], *stop: str) -> tuple[list[str], int]:
    """The pieces, and after how many tokens the stream had enough."""
    stream, found = TextStream(tokenizer, stop), []
    for taken, token in enumerate(ids, start=1):
        found.append(stream.feed(token))
        if stream.is_stopped:
            return [*found, stream.finish()], taken
    return [*found, stream.finish()], len(ids)


@pytest.mark.parametrize("kind", ["bytewise", "fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_add_up(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    found, _ = pieces(tokenizer, ids)
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in found)
    assert sum(map(bool, found)) > 3  # it does stream


def test_bytes_that_never_become_a_character_come_at_the_end(bytewise: PreTrainedTokenizerFast) -> None:
    ids = bytewise("ab€")["input_ids"][:-1]
    found, _ = pieces(bytewise, ids)
    assert "".join(found) == bytewise.decode(ids) == "ab\ufffd"
    assert found[:2] == ["a", "b"]


def test_tokens_without_text_do_not_swallow_the_space_behind_them(
    tiny_tokenizer: Callable[..., Path], tmp_path: Path
) -> None:
    tokenizer = read_tokenizer(tiny_tokenizer(tmp_path))
    ids = [9, 4, 4, 10, 11, 2, 12]
    assert "".join(pieces(tokenizer, ids)[0]) == tokenizer.decode(ids, skip_special_tokens=True) == "w4 w5 w6 w7"


@pytest.mark.parametrize(
    ("text", "stop", "expected", "left_out"),
    [
        ("one two three", ("two",), "one ", 6),
        ("one two three", ("three", "tw"), "one ", 7),
        ("one twotwo", ("xyz", ""), "one twotwo", -1),
        ("aaab", ("aab",), "a", -1),
        ("end of sto", ("stop",), "end of sto", -1),
        ("日本語 text", ("語",), "日本", 5),
    ],
)
def test_stop_words(
    bytewise: PreTrainedTokenizerFast, text: str, stop: tuple[str, ...], expected: str, left_out: int
) -> None:
    ids = bytewise(text)["input_ids"] + [bytewise.eos_token_id]
    found, taken = pieces(bytewise, ids, *stop)
    assert "".join(found) == expected
    if left_out >= 0:
        assert taken == len(ids) - 1 - left_out


def test_what_may_become_a_stop_word_is_held_back(bytewise: PreTrainedTokenizerFast) -> None:
    found, _ = pieces(bytewise, bytewise("a stork")["input_ids"], "stop")
    assert found == ["a", " ", "", "", "", "stor", "k", ""]


def test_offsets_of_tokens(bytewise: PreTrainedTokenizerFast) -> None:
    ids, stream, found = bytewise("aé🎉b")["input_ids"], TextStream(bytewise), []
    for token in ids:
        found.append(stream.offset)
        stream.feed(token)
    assert found == [0, 1, 1, 2, 2, 2, 2, 3]


def test_stop_words_wait_for_the_least_tokens(bytewise: PreTrainedTokenizerFast) -> None:
    for least, text in ((0, "1"), (1, "1"), (2, "1,2"), (4, "1,2,3"), (9, "1,2,3,4")):
        stream = TextStream(bytewise, [","], min_tokens=least)
        assert "".join(map(stream.feed, bytewise("1,2,3,4")["input_ids"])) + stream.finish() == text
