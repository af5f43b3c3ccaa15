"""What a step verifies: a tree of the heads' ranks, and beside it a chain of tokens from the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import numpy as np
import numpy.typing as npt

from medusa_export.heads.trees.tree import Choice, Tree


@dataclass(frozen=True, eq=False)
class StepShape:
    """The nodes of a step, whoever drafts their tokens.

    Attributes:
        heads: the part that heads fill.
        chain: tokens of the text, one behind the other; their first is one more child of the root.
    """

    heads: Tree
    chain: int = 0

    @cached_property
    def tree(self) -> Tree:
        """All nodes; in the chain's choices the ranks stand for nothing."""
        return Tree.from_choices([*self.heads.choices, *self._chain])

    @cached_property
    def first_ranks(self) -> list[int]:
        """Ranks of the first head that are nodes; as counted, and so with gaps where a later guess was right more often."""
        return [choice[0] for choice in self.heads.choices if len(choice) == 1]

    @property
    def _chain(self) -> list[Choice]:
        first = next(rank for rank in count() if rank not in self.first_ranks)  # measured ranks may have gaps
        return [(first, *(0,) * level) for level in range(self.chain)]

    @cached_property
    def _nodes(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        index = {choice: node for node, choice in enumerate(self.tree.choices, start=1)}
        heads, chain = ([index[choice] for choice in part] for part in (self.heads.choices, self._chain))
        return np.array(heads, dtype=np.int64), np.array(chain, dtype=np.int64)

    def fill(
        self,
        last: Sequence[int],
        candidates: npt.NDArray[np.int64] | None,
        chains: Sequence[Sequence[int]],
    ) -> npt.NDArray[np.int64]:
        """The tokens of every sequence's nodes.

        Args:
            last: each sequence's newest token, the root's.  # [active]
            candidates: of the heads, where the shape has nodes for them.  # [active, depth, top_k]
            chains: what each sequence's text drafts. Where it has less than the shape, the newest token stands in: as good as any.

        Returns:
            Tokens.  # [active, N]
        """
        heads, chain = self._nodes
        node_ids = np.empty((len(last), self.tree.num_nodes), dtype=np.int64)
        node_ids[:] = np.asarray(last, dtype=np.int64)[:, None]
        if candidates is not None:
            levels, ranks = self.heads.heads_and_ranks
            node_ids[:, heads] = candidates[:, levels, ranks]
        if self.chain:
            for row, drafted in zip(node_ids, chains, strict=True):
                row[chain[: len(drafted)]] = drafted[: self.chain]
        return node_ids
