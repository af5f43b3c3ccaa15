"""Which tree a server uses with how many sequences at once: what ``medusa-tree search`` found for every batch size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from medusa_export.core.errors import ConfigError
from medusa_export.core.json_fields import odd_value, read_json
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE
from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.trees.tree import Tree, load_tree


@dataclass(frozen=True)
class BatchTrees:
    """A tree by the number of sequences in a step.

    Attributes:
        by_batch: measured batch sizes and their trees, an empty tree where none pays. In between, the next larger size's tree holds,
            and beyond the largest one none: a step of many is dearer with a tree, so the larger size is the careful guess.
    """

    by_batch: Mapping[int, Tree]

    def __call__(self, running: int) -> Tree:
        """The tree of a step of ``running`` sequences."""
        measured = min((batch for batch in self.by_batch if batch >= running), default=None)
        return AUTOREGRESSIVE if measured is None else self.by_batch[measured]

    def require(self, info: EngineInfo) -> None:
        """Raise TreeError or ConfigError for a tree that an engine's heads cannot fill."""
        for tree in self.by_batch.values():
            info.require_tree(tree)

    @classmethod
    def load(cls, path: Path, *, unmeasured: int) -> BatchTrees:
        """From tree.json, whose ``crossover`` says what pays at which batch.

        Args:
            unmeasured: sequences at once up to which its tree is used where batches were not measured.

        Raises:
            TreeError, ConfigError: no such file, or a tree in it that breaks a rule.
        """
        tree = load_tree(str(path))
        body = read_json(path, "what medusa-tree search writes", "search again")
        rows = body.get("crossover") or []
        try:
            found = {int(row["batch"]): Tree.from_choices(row["medusa_choices"]) for row in reversed(rows)}
        except (KeyError, TypeError, ValueError) as error:
            got = f"{odd_value(error)} in crossover"
            raise ConfigError(str(path), got, "what medusa-tree search writes", "search again") from error
        return cls(found if len(found) > 1 else {unmeasured: tree})
