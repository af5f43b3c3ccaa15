"""Prompts from JSONL files, and token ids from a model's own tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from medusa_export.core.errors import ConfigError
from medusa_export.core.regular_files import ENDLESS, found_instead
from medusa_export.core.text.special_tokens import encode_rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = ("system", "user", "assistant")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Prompt:
    """What a model is asked, up to where it answers.

    Attributes:
        id: the file's own id, or the line number.
        category: the file's ``category`` or ``source``, or "".
        messages: ``{"role", "content"}`` dictionaries, the last of them the user's.
        answer: what the assistant said to it, where the file has that; "" otherwise.
        reference: what a person would answer, Spec-Bench's ``reference`` to the first turn; "" otherwise.
    """

    id: str
    category: str
    messages: tuple[dict[str, str], ...]
    answer: str = ""
    reference: str = ""


def load_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """Prompts of a JSONL file, one object a line, in any of three shapes.

    Spec-Bench: ``question_id``, ``category`` and ``turns``, of which the first one is asked. OpenAI: ``messages``,
    with the answers at their end kept apart. Plain: ``prompt``.

    Args:
        path: the file.
        limit: read only the first so many prompts.

    Raises:
        ConfigError: an unreadable file or one without prompts, or a line in no such shape, by file and line number.
    """
    if limit is not None and limit < 1:
        raise ConfigError("limit", f"{limit}", "at least one prompt", "leave it out to read all")
    prompts: list[Prompt] = []
    for number, line in numbered_lines(path):
        if len(prompts) == limit:
            break
        prompts.append(_prompt(line, f"{path}:{number}", number))
    if not prompts:
        raise ConfigError(str(path), "no prompts", "one JSON object a line", "check the file")
    return prompts


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Line numbers, from 1, and lines of a JSONL file; blank lines are left out.

    Raises:
        ConfigError: the file cannot be read.
    """
    kind = found_instead(path)
    if kind is not None:
        raise ConfigError(str(path), f"no readable file ({kind})", "a JSONL file", "check the path")
    try:
        with path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    except OSError as error:
        raise ConfigError(
            str(path), f"no readable file ({error.strerror})", "a JSONL file", "check the path"
        ) from error


def json_object(line: bytes, where: str) -> dict[str, Any]:
    """The object that a JSONL line holds.

    Raises:
        ConfigError: it holds something else; ``where`` is what the error names.
    """
    try:
        body = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(where, f"no JSON ({error})", "one JSON object a line", "correct the line") from error
    if not isinstance(body, dict):
        raise ConfigError(where, f"a JSON {type(body).__name__}", "an object", "correct the line")
    return body


def is_text(value: object) -> TypeGuard[str]:
    """Whether it is text of whole characters: JSON can spell half of a surrogate pair, which no tokenizer takes."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in a local Hugging Face directory.

    Raises:
        ConfigError: there is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    for path in sorted(directory.glob("*")):  # transformers looks for more files than the ones below
        kind = found_instead(path)
        if kind in ENDLESS:
            raise ConfigError(str(path), kind, "a file", "copy the base model's tokenizer files there")
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        expected = f"one of {', '.join(_TOKENIZER_FILES)}"
        raise ConfigError(str(directory), "no tokenizer", expected, "copy the base model's tokenizer files there")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises bare Exceptions on damaged files
        reason = f"{type(error).__name__}: {str(error).split('. ')[0]}"  # its first sentence: others advise to trust it
        raise ConfigError(
            str(directory), f"an unreadable tokenizer ({reason})", "tokenizer files", "copy the base model's again"
        ) from error
    return tokenizer


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation in the model's chat template, up to where the assistant's answer starts.

    Special tokens that a message spells stay text.

    Raises:
        ConfigError: the tokenizer has no chat template, or the template refuses these messages.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            str(tokenizer.name_or_path), "no chat template", "a tokenizer of a chat model", "use an instruct model"
        )

    def render(conversation: list[dict[str, str]]) -> str:
        try:
            return str(tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # a template computes, so it can fail in every way that Python can
            raise ConfigError(
                f"{tokenizer.name_or_path} chat template",
                f"a refusal ({error})",
                "messages it takes",
                "change the prompts",
            ) from error

    return encode_rendered(tokenizer, messages, render)


def _prompt(line: bytes, where: str, number: int) -> Prompt:
    body = json_object(line, where)
    messages = _messages(body, where)
    answers: list[str] = []
    while messages and messages[-1]["role"] == "assistant":
        answers.insert(0, messages.pop()["content"])
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise ConfigError(where, "nothing that a user asks", "a last message of the user's", "correct the line")
    prompt_id = body.get("question_id", body.get("id", number))
    category = body.get("category", body.get("source", ""))
    reference = body.get("reference")
    first = reference[0] if isinstance(reference, list) and reference else reference
    known = first if is_text(first) else ""
    return Prompt(str(prompt_id), str(category), tuple(messages), "\n".join(answers), known)


def _messages(body: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    """The conversation of one line, whichever shape it has."""
    if "messages" in body:
        messages = body["messages"]
    elif "turns" in body:
        turns = body["turns"]
        messages = [{"role": "user", "content": turns[0]}] if isinstance(turns, list) and turns else None
    elif "prompt" in body:
        messages = [{"role": "user", "content": body["prompt"]}]
    else:
        seen = ", ".join(sorted(map(str, body))[:6]) or "nothing"
        raise ConfigError(where, f"the keys {seen}", "messages, turns or prompt", "correct the line")
    if not isinstance(messages, list):
        raise ConfigError(where, f"{type(messages).__name__} for a list", "messages or turns", "correct the line")
    return [_message(message, where) for message in messages]


def _message(message: object, where: str) -> dict[str, str]:
    """Role and content alone; other keys would reach the chat template."""
    if not isinstance(message, dict) or message.get("role") not in _ROLES or not is_text(message.get("content")):
        expected = f"a role of {', '.join(_ROLES)} and text as content"
        raise ConfigError(where, f"the message {str(message)[:80]!r}", expected, "correct the line")
    return {"role": message["role"], "content": message["content"]}
