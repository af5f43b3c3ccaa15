"""Conversations as token ids, with a mark on what the model said: the only tokens that heads learn to predict."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medusa_export.core.errors import ConfigError
from medusa_export.core.text.encoding import encode_chat
from medusa_export.core.text.special_tokens import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """One conversation.

    Attributes:
        input_ids: under the chat template.  # [S]
        answer_mask: tokens that the assistant said, the one that ends its turn included.  # [S]
    """

    input_ids: list[int]
    answer_mask: list[bool]


def read_rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Rows of JSONL files with ``messages``, or of directories' ``conversations.jsonl``.

    Raises:
        ConfigError: a file that cannot be read, by line number.
    """
    rows = []
    for path in paths:
        file = path / "conversations.jsonl" if path.is_dir() else path
        try:
            lines = file.read_bytes().splitlines()
        except OSError as error:
            raise ConfigError(str(file), f"no readable file ({error.strerror})", "JSONL", "check the path") from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(_row(line, f"{file}:{number}"))
    return rows


def usable(row: Mapping[str, Any]) -> bool:
    """Whether an answer is whole: truncated and empty ones are marked by the program that made them."""
    marked = row.get("usable", row.get("finish_reason", "stop") == "stop")
    return bool(marked) and bool(row["messages"][-1]["content"].strip())


def encode(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], eos: Sequence[int]) -> Example:
    """A row's conversation; each of the assistant's turns ends with the end-of-sequence token unless it was cut.

    The ids of a turn are those that the engine would see: the template up to where the answer starts, then the answer.

    Args:
        tokenizer: of the base model, with a chat template.
        row: ``messages``, and whether the last answer was cut.
        eos: end-of-sequence ids; the first one ends a turn.

    Raises:
        ConfigError: the tokenizer has no chat template, or it does not extend a conversation by what follows.
    """
    ids: list[int] = []
    mask: list[bool] = []
    messages = row["messages"]
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = encode_chat(tokenizer, messages[:index])
        answer = token_ids(tokenizer, message["content"])
        cut = index == len(messages) - 1 and row.get("finish_reason", "stop") != "stop"
        answer = [*answer, *([] if cut else eos[:1])]
        if prompt[: len(ids)] != ids:  # the earlier turns, as the template renders them now
            ids, mask = ids[:0], mask[:0]
        mask += [False] * (len(prompt) - len(mask)) + [True] * len(answer)
        ids = [*prompt, *answer]
    return Example(ids, mask)


def load_examples(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    eos: Sequence[int],
    max_length: int,
    vocab_size: int,
    keep_truncated: bool = False,
) -> list[Example]:
    """Examples of all usable rows, cut at ``max_length`` tokens; those without two answer tokens are left out.

    Args:
        rows: as medusa-data writes them.
        eos: end-of-sequence ids.
        max_length: tokens of an example, at most.
        vocab_size: tokens that the model has.
        keep_truncated: take answers that were cut at medusa-data's --max-tokens too.

    Raises:
        ConfigError: nothing is left, or the tokenizer does not fit the model.
    """
    if len(tokenizer) > vocab_size + 1024:
        got = f"{len(tokenizer)} tokens in the tokenizer"
        raise ConfigError("vocabulary", got, f"at most the model's {vocab_size}", "use this model's tokenizer")
    examples, left_out = [], 0
    for row in rows:
        if not keep_truncated and not usable(row):
            left_out += 1
            continue
        example = encode(tokenizer, row, eos)
        example = Example(example.input_ids[:max_length], example.answer_mask[:max_length])
        if max(example.input_ids, default=0) >= vocab_size:
            got = f"token {max(example.input_ids)}"
            raise ConfigError("vocabulary", got, f"ids below {vocab_size}", "use this model's own tokenizer")
        if sum(example.answer_mask) >= 2:
            examples.append(example)
    if not examples:
        got = f"no usable conversation, {left_out} truncated or empty"
        raise ConfigError("training data", got, "at least one whole answer", "make more, or pass --keep-truncated")
    return examples


def split(examples: Sequence[Example], share: float) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, by a hash of the prompt, so that a conversation stays on its side when data is added.

    Raises:
        ConfigError: nothing is left to learn from.
    """
    held = [example for example in examples if _fraction(example) < share]
    held = held or list(examples[-1:])
    kept = set(map(id, held))
    dataset = [example for example in examples if id(example) not in kept]
    if not dataset:
        got = f"{len(examples)} usable, all of them held out to measure on"
        raise ConfigError("training data", got, "one more to learn from", "give more conversations, or --eval-data")
    return dataset, held


def with_prompts(examples: Iterable[Example]) -> list[Example]:
    """The same conversations, all of whose tokens are learnt, not only the answers: the states of prompts are free."""
    return [Example(each.input_ids, [False, *[True] * (len(each.input_ids) - 1)]) for each in examples]


def data_hash(examples: Iterable[Example]) -> str:
    """Hexadecimal SHA-256 of all ids and masks, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.asarray(example.input_ids, dtype=np.int64).tobytes())
        digest.update(np.asarray(example.answer_mask, dtype=np.bool_).tobytes())
    return digest.hexdigest()


def _fraction(example: Example) -> float:
    prompt = example.input_ids[: example.answer_mask.index(True)]
    return int.from_bytes(hashlib.sha256(np.asarray(prompt, dtype=np.int64).tobytes()).digest()[:4], "big") / 2**32


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(where, f"no JSON ({error})", "one JSON object a line", "correct the line") from error
    messages = row.get("messages") if isinstance(row, dict) else None
    fits = isinstance(messages, list) and all(
        isinstance(item, dict) and isinstance(item.get("content"), str) and "role" in item for item in messages
    )
    if not fits or not messages or messages[-1]["role"] != "assistant":
        raise ConfigError(where, "no conversation that an assistant ends", "messages", "make it with medusa-data")
    return row
