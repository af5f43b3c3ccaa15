"""A model's own tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from medusa_export.core.errors import ConfigError
from medusa_export.core.regular_files import ENDLESS, found_instead

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_TEMPLATE_HELP = "Jinja file with a chat template, to use instead of the tokenizer's own."
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def read_tokenizer(directory: Path, chat_template: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in a local Hugging Face directory.

    Args:
        chat_template: a file with the template to use instead of the tokenizer's own, in Jinja.

    Raises:
        ConfigError: there is none, transformers cannot read it, or the template is none.
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
    if chat_template is not None:
        _set_chat_template(tokenizer, chat_template)
    return tokenizer


def _set_chat_template(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Use a file's template from now on, once it has rendered a question."""
    where, action = f"--chat-template {path}", "take the one that the model was trained with"
    kind = found_instead(path)
    if kind is not None:
        raise ConfigError(where, kind, "a file with a Jinja template", "check the path")
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": "question"}], tokenize=False)
    except Exception as error:  # a template computes, so it can fail in every way that Python can
        raise ConfigError(where, f"no usable template ({error})", "a Jinja template", action) from error
    if "question" not in str(rendered):
        raise ConfigError(where, "a template that leaves out the question", "one that renders messages", action)


# what save_pretrained of a tokenizer may write, and the defaults of generation
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
