"""What a server of an engine can be told, in one dataclass: flags, a model's parameters and their checks follow from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from medusa_export.core.errors import ConfigError

MAY_BE_NOTHING = ("threads", "tree_max_batch", "grace_s")


@dataclass(frozen=True)
class ServingOptions:
    """Limits and defaults of a server.

    Attributes:
        max_batch: requests that are decoded at once, at most; each has a row of the KV cache.
        kv_cache_mb: memory for the KV cache; fewer requests are decoded at once where it is not enough for ``max_batch``.
        max_queue: requests that wait, at most; further ones are told that the server is busy.
        max_tokens: tokens of an answer where the request does not say.
        timeout_s: seconds of a request, waiting included, at most.
        max_text_bytes: text of a request, at most.
        tree_max_batch: requests at once, at most, with which the tree is used, where tree.json does not say what pays at which batch.
        grace_s: seconds that requests in flight get when the server is told to stop; the rest hears that it does. Triton has to wait
            longer (--exit-timeout-secs, 30).
        prefill_tokens: of prompts that are read between two steps: fewer make steadier answers, more make earlier ones.
        threads: CPU threads; 0 takes one a core.

    Raises:
        ConfigError: a value out of range.
    """

    max_batch: int = 32
    kv_cache_mb: int = 4096
    max_queue: int = 256
    max_tokens: int = 256
    timeout_s: float = 600.0
    max_text_bytes: int = 1 << 20
    tree_max_batch: int = 4
    grace_s: float = 20.0
    prefill_tokens: int = 128
    threads: int = 0

    def __post_init__(self) -> None:
        for item in fields(self):
            value, least = getattr(self, item.name), 0 if item.name in MAY_BE_NOTHING else 1
            if not (math.isfinite(value) and value >= least):
                flag = f"--{item.name.replace('_', '-')}"
                raise ConfigError(flag, f"{value}", f"{least} or more", "change it")

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
