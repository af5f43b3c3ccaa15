"""What a server of an engine can be told, in one dataclass: flags, a model's parameters and their checks follow from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from medusa_export.core.errors import ConfigError
from medusa_export.core.flags import COUNT, NUMBER, flag
from medusa_export.engines.decoding.draft_flags import AUTO, DRAFTS_CHOICES, DRAFTS_HELP, require_known

INPUT, LIMITS, DECODING = "Input", "Limits", "Decoding"  # headings of --help
MAX_QUEUE, QUEUE_HELP = 256, "Maximum number of waiting requests; further ones are refused as busy."
MAX_TEXT_BYTES, TEXT_HELP = 1 << 20, "Maximum bytes of text in a request."
MAY_BE_NOTHING = ("threads", "tree_max_batch", "grace_s")


@dataclass(frozen=True)
class ServingOptions:
    """Limits and defaults of a server.

    Each request that is decoded has a row of the KV cache. On ``grace_s``: Triton has to wait longer (--exit-timeout-secs, 30).

    Raises:
        ConfigError: a value out of range.
    """

    max_batch: int = flag(
        32,
        help="Maximum number of requests decoded at once.",
        panel=LIMITS,
        aliases=("--max-concurrent",),
        bounds=NUMBER,
    )
    kv_cache_mb: int = flag(
        4096, help="Memory for the key/value cache; if it cannot hold --max-batch sequences, fewer are decoded at once.",
        panel=LIMITS, metavar="MB", bounds=NUMBER,
    )  # fmt: skip
    max_queue: int = flag(MAX_QUEUE, help=QUEUE_HELP, panel=LIMITS, bounds=NUMBER)
    max_tokens: int = flag(
        256, help="Maximum tokens in an answer, if the request does not say.", panel=LIMITS, bounds=NUMBER
    )
    timeout_s: float = flag(
        600.0, help="Maximum seconds for a request, including waiting.", panel=LIMITS, metavar="SECONDS", bounds=NUMBER,
    )  # fmt: skip
    max_text_bytes: int = flag(MAX_TEXT_BYTES, help=TEXT_HELP, panel=LIMITS, metavar="BYTES", bounds=NUMBER)
    tree_max_batch: int = flag(
        4, help="Use the tree with up to this many requests at once, if tree.json does not say at which batch sizes it pays.",
        panel=DECODING, bounds=COUNT,
    )  # fmt: skip
    grace_s: float = flag(
        20.0, help="Seconds for requests in flight to finish when the server stops; tritonserver itself waits 30.",
        panel=LIMITS, metavar="SECONDS", bounds=COUNT,
    )  # fmt: skip
    prefill_tokens: int = flag(
        128, help="Prompt tokens to read between two decoding steps: fewer make answers steadier, more start them earlier.",
        panel=DECODING, bounds=NUMBER,
    )  # fmt: skip
    threads: int = flag(0, help="CPU threads; 0: one per core.", panel=DECODING, bounds=COUNT)
    drafts: str = flag(AUTO, help=DRAFTS_HELP, panel=DECODING, choices=DRAFTS_CHOICES)

    def __post_init__(self) -> None:
        require_known(self.drafts)
        for item in fields(self):
            if item.type == "str":
                continue
            value, least = getattr(self, item.name), 0 if item.name in MAY_BE_NOTHING else 1
            if not (math.isfinite(value) and value >= least):
                flag = f"--{item.name.replace('_', '-')}"
                expected = f"{least} or more" if math.isfinite(value) else f"a finite number, {least} or more"
                raise ConfigError(flag, f"{value}", expected, "change it")

    @classmethod
    def may_be(cls, name: str) -> str:
        """What an option may be, in words; nothing for one that is none."""
        words = {"int": "an integer", "float": "a number", "str": f"one of {', '.join(DRAFTS_CHOICES)}"}
        found = next((words[str(item.type)] for item in fields(cls) if item.name == name), "")
        least = 0 if name in MAY_BE_NOTHING else 1
        return f"{found}, {least} or more" if found.startswith("a") else found

    def as_text(self) -> dict[str, str]:
        """The values as a model's parameters."""
        return {name: str(value) for name, value in asdict(self).items()}

    @classmethod
    def from_text(cls, parameters: Mapping[str, str]) -> ServingOptions:
        """Options from a model's parameters; those that it does not have keep their defaults.

        Raises:
            ConfigError: a value that is no number, or out of range.
        """
        values = {}
        for item in fields(cls):
            text = parameters.get(item.name)
            if text is not None:
                try:
                    values[item.name] = type(item.default)(text)  # type: ignore[misc]
                except ValueError as error:
                    raise ConfigError(item.name, repr(text), "a number", "correct config.pbtxt") from error
        return cls(**values)


@dataclass(frozen=True)
class TreeChoice:
    """The tree to decode with, where it is not the engine's own."""

    tree: Path | None = flag(
        None, help="tree.json of medusa-tree search to use instead of the engine's. One that was searched with costs of several "
        "batch sizes says which tree to use with how many requests at once.", panel=DECODING,
    )  # fmt: skip
