"""What drafts a step: Medusa heads with one tree, heads and text by what pays, or nothing. The step verifies all alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from medusa_export.engines.decoding.lookup import TextLookup
from medusa_export.engines.decoding.payoff import DraftedText, StepWorth
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE, FirstDrafts, StepDecoder
from medusa_export.engines.decoding.shapes import StepShape
from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.trees.followers import Followers
from medusa_export.heads.trees.search import Frequencies, grow
from medusa_export.heads.trees.step_costs import StepCosts
from medusa_export.heads.trees.tree import Choice, Tree

HEAD_NODES = (0, 1, 2, 3)  # sizes that are chosen from; more of them gain little, and each has buffers in an engine
CHAINS = (0, 3, 5, 8, 12)
BUCKET = 64  # tokens of context whose step costs are looked up once

Drafts = tuple[Tree, npt.NDArray[np.int64]]  # the nodes of a step and their tokens, [active, N]


class Drafted(Protocol):
    """A sequence, as far as its drafter has to know it."""

    first_drafts: FirstDrafts | None

    def extend(self, tokens: Sequence[int]) -> None:
        """New tokens of its text."""


class Drafter(Protocol):
    """Guesses the next tokens of sequences. What is right is decided by the step that verifies them."""

    trees: Sequence[Tree]  # what its steps may verify
    depths: Sequence[int]  # how many heads they may ask

    def begin(self, tokens: Sequence[int]) -> Any:
        """A sequence, from its prompt and first token; what :meth:`draft` is given, and is told of new tokens."""

    def draft(self, decoder: StepDecoder, sequences: Sequence[Any], remaining: int) -> Drafts:
        """Nodes for the next step of every active sequence.

        Args:
            decoder: whose heads may be asked.
            sequences: of its slots, in their order.
            remaining: tokens that still fit into the fullest one, at least 1.
        """


class LastToken:
    """A sequence whose drafter reads no text."""

    first_drafts = None

    def __init__(self, last: int) -> None:
        self.last = last

    def extend(self, tokens: Sequence[int]) -> None:
        self.last = tokens[-1]


class TreeDrafter:
    """Medusa heads with one tree, by the number of sequences; an empty one is autoregressive decoding.

    Args:
        trees: every tree there may be.
        choose: number of sequences -> tree. None: the only one.
        info: of the engine whose heads fill them.

    Raises:
        TreeError, ConfigError: a tree that they cannot fill.
    """

    def __init__(self, trees: Sequence[Tree], info: EngineInfo, choose: Callable[[int], Tree] | None = None) -> None:
        for tree in trees:
            info.require_tree(tree)
        self.trees: Sequence[Tree] = trees
        self.depths: Sequence[int] = sorted({tree.depth for tree in trees} - {0})
        self._choose = choose or (lambda running: trees[0])

    def begin(self, tokens: Sequence[int]) -> LastToken:
        return LastToken(tokens[-1])

    def draft(self, decoder: StepDecoder, sequences: Sequence[LastToken], remaining: int) -> Drafts:
        """As :meth:`Drafter.draft`: the heads' candidates, or none where no tree fits any more."""
        tree = self._choose(len(sequences))
        return draft_heads(
            decoder, tree if remaining >= tree.num_nodes else AUTOREGRESSIVE, [each.last for each in sequences]
        )


class PayingDrafter:
    """Text and heads, step by step as it pays: most expected tokens for the step's cost, over all sequences of the step.

    What is expected depends on a sequence's own text only, and costs are looked up, never timed: a request alone takes the same steps
    whenever it is run.

    Args:
        paths: how often the true continuation begins with a path of the heads' ranks, as a share; none: no heads.
        costs: of steps.
        max_nodes: that a step of the engine takes.
        followers: what often follows a token, to order the heads' candidates by; None: they stay as the heads rank them.
    """

    def __init__(
        self, paths: Frequencies, costs: StepCosts, max_nodes: int, followers: Followers | None = None
    ) -> None:
        self._costs, self._followers = costs, followers
        order: list[Choice] = list(islice(grow(paths), max(HEAD_NODES)))
        sizes = sorted({min(size, len(order)) for size in HEAD_NODES})
        trees = [Tree.from_choices(order[:size]) for size in sizes]
        shapes = [StepShape(tree, chain) for tree in trees for chain in CHAINS]
        self._shapes = [shape for shape in shapes if shape.tree.num_nodes <= max_nodes]
        self.trees: Sequence[Tree] = [shape.tree for shape in self._shapes]
        self.depths: Sequence[int] = sorted({shape.heads.depth for shape in self._shapes} - {0})
        heads = [sum(paths[choice] for choice in shape.heads.choices) for shape in self._shapes]
        self._sizes = [
            (shape.tree.num_nodes, shape.chain, share) for shape, share in zip(self._shapes, heads, strict=True)
        ]
        self._firsts = [sum(paths[rank,] for rank in shape.first_ranks) for shape in self._shapes]
        self._prices: dict[tuple[int, int], list[float]] = {}

    def begin(self, tokens: Sequence[int]) -> DraftedText:
        return DraftedText(TextLookup(tokens))

    def draft(self, decoder: StepDecoder, sequences: Sequence[DraftedText], remaining: int) -> Drafts:
        """As :meth:`Drafter.draft`: the shape of heads and chains that pays most now."""
        for sequence in sequences:
            sequence.guess(max(CHAINS))
        index = self._choose(sequences, remaining)
        shape, last = self._shapes[index], [sequence.last for sequence in sequences]
        if not shape.heads.choices:
            return shape.tree, shape.fill(last, None, [sequence.chain for sequence in sequences])
        candidates = decoder.draft(shape.heads.depth)  # [active, depth, top_k]
        if self._followers:
            candidates = self._followers.order(last, candidates)
        for sequence, firsts in zip(sequences, candidates[:, 0, shape.first_ranks].tolist(), strict=True):
            sequence.candidates, sequence.head_share = firsts, self._firsts[index]
        return shape.tree, shape.fill(last, candidates, [sequence.chain for sequence in sequences])

    def _choose(self, sequences: Sequence[DraftedText], remaining: int) -> int:
        """The shape that pays most; of equally good ones the first, which is the smallest."""
        past = sum(len(sequence.lookup.tokens) for sequence in sequences) // len(sequences)
        prices = self._prices_at(len(sequences), past // BUCKET)
        worth = StepWorth(sequences, max(CHAINS))
        has_match, best, found = any(sequence.match for sequence in sequences), 0.0, 0
        for index, (nodes, chain, heads) in enumerate(self._sizes):
            if nodes > remaining or (chain and not has_match):
                continue
            rate = worth.tokens(chain, heads) / prices[index]
            if rate > best:
                best, found = rate, index
        return found

    def _prices_at(self, batch: int, bucket: int) -> list[float]:
        """Of every shape's step."""
        prices = self._prices.get((batch, bucket))
        if prices is None:
            past = bucket * BUCKET + BUCKET / 2
            prices = [
                self._costs.ms(shape.tree.num_nodes, shape.heads.depth, past, batch) for shape in self._shapes
            ]  # fmt: skip
            self._prices[batch, bucket] = prices
        return prices


def draft_heads(decoder: StepDecoder, tree: Tree, last: Sequence[int]) -> Drafts:
    """A tree of the heads' ranks for every active sequence, whose newest tokens are ``last``.

    Args:
        decoder: whose heads are asked.
        tree: its choices are the heads and ranks that nodes take.
        last: newest token of every active sequence.  # [active]
    """
    node_ids = np.empty((len(last), tree.num_nodes), dtype=np.int64)
    node_ids[:, 0] = last
    if tree.max_draft_len:
        heads, ranks = tree.heads_and_ranks
        node_ids[:, 1:] = decoder.draft(tree.depth)[:, heads, ranks]
    return tree, node_ids


def fitting_paths(paths: Mapping[Choice, float], positions: float, info: EngineInfo) -> dict[Choice, float]:
    """Shares of the paths that an engine's heads can draft.

    Args:
        positions: what they were counted out of.
    """
    return {
        path: count / positions
        for path, count in paths.items()
        if len(path) <= info.max_depth and max(path) < info.top_k
    }
