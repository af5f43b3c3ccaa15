"""What an export asks of engines: it is handed in, because the exporter imports no engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from medusa_export.core.text.prompts import Prompt

Progress = Callable[[str, int, int], None]  # stage, done, total


class EngineBuilder(Protocol):
    """Builds engines for GPUs."""

    def require(self, target: Any) -> None:
        """Raise MedusaExportError unless engines for these GPUs, or this release, can be built on this machine."""

    def build(self, source: Path, out: Path, progress: Progress, **request: Any) -> None:
        """Write the engines of ``source``, and what they take and give, into ``out``.

        Args:
            source: directory of what engines are made of.
            out: an existing directory.
            progress: called with (stage, done, total).
            request: what the builder wants to know besides.
        """


class NothingToBuild:
    """The builder of engines that are complete when their graph is written."""

    def require(self, target: Any) -> None:
        """Everything is there."""

    def build(self, source: Path, out: Path, progress: Progress, **request: Any) -> None:
        """As :meth:`EngineBuilder.build`; never called."""
        raise AssertionError(f"nothing is built of {source}")


@dataclass(frozen=True)
class EngineTools:
    """The engines' part of an export.

    Attributes:
        check: ``(engine directory, checkpoint, texts) -> problems``. Runs a written engine on some texts, given as token ids; the
            checkpoint is what its logits are compared with, None for models too large to load beside it.
        choose_tree: ``(engine directory, prompts, progress) -> reason``. Measures trees on a written engine and leaves tree.json and
            acceptance.json in its directory.
        builder: builds engines for GPUs.
    """

    check: Callable[[Path, Path | None, list[list[int]]], list[str]]
    choose_tree: Callable[[Path, Sequence[Prompt], Progress], str]
    builder: EngineBuilder
