"""``--drafts`` as --help has it; apart from the drafters, so that help pages load none of them."""

from __future__ import annotations

from medusa_export.core.errors import ConfigError

DRAFTS_HELP = "What drafts the tokens that a step verifies."
AUTO = "auto"
DRAFTS_CHOICES = {
    AUTO: "both; heads with --tree or on TensorRT-LLM; text without heads",
    "heads": "the tree of Medusa heads",
    "text": "what followed the same words before",
    "both": "heads and text, step by step as it pays",
    "none": "nothing",
}


def require_known(drafts: str) -> None:
    """Raise ConfigError for a name that ``--drafts`` does not have."""
    if drafts not in DRAFTS_CHOICES:
        raise ConfigError("--drafts", drafts, f"one of {', '.join(DRAFTS_CHOICES)}", "choose one of them")
