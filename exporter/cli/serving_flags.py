"""The flags that medusa-serve and medusa-triton share; values that are not given are left to what they configure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

_Options = TypeVar("_Options")

KvCacheMb = Annotated[
    int | None,
    typer.Option(help="Memory for the key/value cache; it may lower how many are decoded at once. Default: 4096."),
]
MaxTokens = Annotated[int | None, typer.Option(help="Tokens of an answer where a request does not say. Default: 256.")]
TimeoutS = Annotated[float | None, typer.Option(help="Seconds of a request, at most. Default: 600.")]
MaxTextBytes = Annotated[int | None, typer.Option(help="Text of a request, at most. Default: 1 MiB.")]
TreeFile = Annotated[
    Path | None,
    typer.Option(
        help="tree.json of medusa-tree search instead of the engine's. One from costs of several batch sizes says which tree "
        "is used with how many requests at once."
    ),
]
TreeMaxBatch = Annotated[
    int | None,
    typer.Option(help="Requests at once up to which a tree is used that says nothing of batches. Default: 4."),
]
GraceS = Annotated[
    float | None,
    typer.Option(
        help="Seconds that requests in flight get when the server stops; tritonserver itself waits 30. Default: 20."
    ),
]
PrefillTokens = Annotated[
    int | None,
    typer.Option(
        help="Prompt tokens that are read between two steps: fewer make steadier answers, more earlier ones. Default: 128."
    ),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads; 0 takes one a core. Default: 0.")]


def given_options(kind: type[_Options], given: Mapping[str, Any]) -> _Options:
    """A dataclass of options from the flags that were given, by name.

    Raises:
        ConfigError: a value that it refuses.
    """
    chosen = {item.name: given[item.name] for item in fields(kind) if given.get(item.name) is not None}  # type: ignore[arg-type]
    return kind(**chosen)
