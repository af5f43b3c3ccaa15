"""Tokenizers: against the vocabulary, and against the source's or another copy in the same export."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medusa_export.core.json_fields import read_json
from medusa_export.core.text.tokenizer import read_tokenizer

BEYOND = 1024  # ids that a model's own tokenizer may have beyond the embedding, as some do
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")  # in tokenizer_config.json
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def tokenizer_problems(
    path: Path, vocab_size: int, other: Path | None, whose: str, *, own_template: bool = False
) -> list[str]:
    """What is wrong with a directory's tokenizer.

    Args:
        vocab_size: of the model; ids are below it.
        other: a directory whose tokenizer it has to be; None: there is none to compare with.
        whose: that one's owner, for the message.
        own_template: whether its chat template may be another one, of --chat-template.

    Raises:
        ConfigError: no tokenizer that can be read.
    """
    tokenizer: Any = read_tokenizer(path)
    problems = []
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if other is None and largest >= vocab_size + BEYOND:
        got = f"the tokenizer has the id {largest}; the model has {vocab_size} tokens"
        problems.append(f"{path.name}: {got}: it is another model's")
    problems += _id_problems(path, tokenizer.get_vocab())
    problems += [f"{path.name}: {line}" for line in _template_problems(tokenizer)]
    if other is None:
        problems += [f"{path.name}: {line}" for line in _own_problems(path)]
    else:
        problems += [
            f"{path.name}: {what} is not {whose}"
            for what in _differences(tokenizer, read_tokenizer(other), own_template)
        ]
    return problems


def _own_problems(path: Path) -> Iterator[str]:
    """What a tokenizer's files say against themselves, where there is no other one to compare with."""
    files = [path / name for name in ("tokenizer.json", "tokenizer_config.json")]
    if all(file.is_file() for file in files):
        body, config = map(read_json, files)
        vocab = (body.get("model") or {}).get("vocab") or {}
        ids = Counter(vocab.values() if isinstance(vocab, dict) else ())
        if twice := [token for token, count in ids.items() if count > 1]:
            yield f"tokenizer.json gives the id {min(twice)} to {ids[min(twice)]} tokens"
        known = {token["content"] for token in body.get("added_tokens") or []} | _words(body)
        for key in NAMED:
            name = config.get(key)
            name = name.get("content") if isinstance(name, dict) else name
            if isinstance(name, str) and name not in known:
                yield f"tokenizer_config.json has the {key} {name!r}, which tokenizer.json does not know"


def _template_problems(tokenizer: Any) -> Iterator[str]:
    if tokenizer.chat_template:
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "question"}], tokenize=False)
        except Exception as error:  # a template computes, so it can fail in every way that Python can
            yield f"the chat template does not render a question ({error})"


def _words(body: dict[str, Any]) -> set[str]:
    """The vocabulary of tokenizer.json, in the forms of its models."""
    vocab = (body.get("model") or {}).get("vocab") or {}
    return set(vocab) if isinstance(vocab, dict) else {entry[0] for entry in vocab}


def tokenizer_notes(path: Path, vocab_size: int) -> list[str]:
    """What is unusual and works: a tokenizer with more tokens than the embedding has rows."""
    largest = max(read_tokenizer(path).get_vocab().values(), default=-1)
    if largest < vocab_size:
        return []
    got = f"the tokenizer has the id {largest}; the model has {vocab_size} tokens"
    return [f"{got}: prompts with an id from {vocab_size} on are refused"]


def _id_problems(path: Path, vocabulary: dict[str, int]) -> Iterator[str]:
    """Ids of added tokens in the file that are not those of its vocabulary; the library goes by the vocabulary, others may not."""
    file = path / "tokenizer.json"
    for token in (read_json(file).get("added_tokens") or []) if file.is_file() else ():
        known = vocabulary.get(token["content"])
        if known != token["id"]:
            yield f"{path.name}: tokenizer.json gives {token['content']} the id {token['id']}, its vocabulary {known}"


def _differences(one: Any, other: Any, own_template: bool) -> Iterator[str]:
    mine, theirs = (_description(each) for each in (one, other))
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key) != theirs.get(key):
            yield f"the tokenizer's {key}"
    if not own_template and one.chat_template != other.chat_template:
        yield "the chat template"
    for name in (*SPECIAL, "padding_side", "truncation_side", "clean_up_tokenization_spaces", "model_max_length"):
        if getattr(one, name, None) != getattr(other, name, None):
            yield f"the tokenizer's {name}"
    if one.get_vocab() != other.get_vocab():
        yield "the vocabulary"


def _description(tokenizer: Any) -> dict[str, Any]:
    """All rules of a fast tokenizer; of a slow one nothing but what its methods tell."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {}
    body: dict[str, Any] = json.loads(backend.to_str())
    return {key: value for key, value in body.items() if key not in ("truncation", "padding")}
