"""Token ids from a model's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medusa_export.core.errors import ConfigError
from medusa_export.core.regular_files import ENDLESS, found_instead
from medusa_export.core.text.special_tokens import encode_rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


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


# what save_pretrained of a tokenizer may write, and the defaults of generation
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
