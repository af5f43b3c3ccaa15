"""What an engine is to the decoding loop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.trees.tree import Tree

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

AUTOREGRESSIVE = Tree(())


class Step(Protocol):
    """One tree bound to an engine's buffers."""

    def verify(self, node_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Run the base model on all nodes; its greedy next token after each.  # [N] -> [N]"""

    def verify_logits(self, node_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """As :meth:`verify`, but the logits that tokens are chosen from.  # [N] -> [N, info.sampled]"""

    def commit(self, path: npt.NDArray[np.int64]) -> None:
        """Make the accepted nodes the newest rows of the KV cache and drop the others."""


class StepEngine(Protocol):
    """An engine whose steps this process drives; the decode loop does the rest."""

    info: EngineInfo
    max_nodes: int  # that a step takes, the root included

    def prefill(self, input_ids: Sequence[int]) -> int:
        """Empty the KV cache, run the prompt, and return the greedy next token."""

    def prefill_logits(self, input_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """As :meth:`prefill`, but the logits that the next token is chosen from.  # [S] -> [info.sampled]"""

    def prepare(self, tree: Tree) -> Step:
        """Bind a tree; cheap after the first time."""

    def open_heads(self, depth: int) -> None:
        """Make the first heads ready; cheap after the first time."""

    def draft(self, depth: int) -> npt.NDArray[np.int64]:
        """Candidates of the first heads for the last kept row.  # [depth, top_k]"""

    def rewind(self, length: int) -> None:
        """Drop the rows of the KV cache from ``length`` on; what the heads read stays."""

    @property
    def length(self) -> int:
        """Rows in the KV cache."""

    @property
    def backend_seconds(self) -> float:
        """Time spent inside the backend since the engine was made."""


class ScoringEngine(StepEngine, Protocol):
    """A step engine that also gives the logits of given texts, for checks and comparisons."""

    def score(self, input_ids: Sequence[int], *, chunk: int, start: int = 0) -> Iterable[npt.NDArray[np.float32]]:
        """Next-token logits of a text, ``chunk`` tokens a run, from token ``start`` on.  # [chunk, vocab_size] a run

        Args:
            input_ids: the text.
            chunk: tokens of a run.
            start: first token whose next-token logits are wanted.
        """

    def tree_logits(self, tree: Tree, prompt: Sequence[int], node_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Next-token logits after every node of a tree behind a prompt.  # [N] -> [N, vocab_size]

        Args:
            tree: its mask and positions.
            prompt: token ids.
            node_ids: token of every node, the root first.  # [N]
        """


@runtime_checkable
class WholeEngine(Protocol):
    """An engine whose runtime decodes whole answers; this process cannot drive its steps."""

    info: EngineInfo

    def decode(
        self, input_ids: Sequence[int], tree: Tree, *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> Generation:
        """One greedy answer, up to and including the first end-of-sequence id.

        Args:
            input_ids: the prompt.
            tree: what its steps verify; an empty one decodes plainly.
            max_new_tokens: most tokens of the answer.
            eos_token_ids: any of them ends it.
        """


class StepDecoder(Protocol):
    """Active sequences whose steps :func:`~medusa_export.engines.decoding.step.decode_step` takes, all in one run."""

    def draft(self, depth: int) -> npt.NDArray[np.int64]:
        """Candidates of the first heads for every active sequence.  # [active, depth, top_k]"""

    def verify(self, tree: Tree, node_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The base model's greedy next token after every node.  # [active, N] -> [active, N]"""

    def verify_logits(self, tree: Tree, node_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """As :meth:`verify`, but the logits that tokens are chosen from.  # [active, N] -> [active, N, info.sampled]"""

    def commit(self, paths: Sequence[npt.NDArray[np.int64]]) -> None:
        """Make every sequence's accepted nodes the newest rows of its cache, and drop the others."""


class TreeDecoder(StepDecoder, Protocol):
    """Sequences in slots ``0 .. active - 1``, whose steps the scheduler drives; slots that are in use come first."""

    info: EngineInfo
    max_length: int
    max_nodes: int  # that a step takes, the root included
    slots: int
    active: int

    def prepare(self, trees: Sequence[Tree], depths: Sequence[int]) -> None:
        """Make steps ready, so that no request's first one waits for it.

        Args:
            trees: that may be verified.
            depths: numbers of heads that may be asked for drafts.

        Raises:
            ConfigError: a tree that is too large.
        """

    def remaining(self, slot: int) -> int:
        """Tokens that still fit."""

    def begin(self, input_ids: Sequence[int]) -> None:
        """Prepare a prompt that :meth:`prefill_chunk` runs in parts, with steps of the others in between."""

    def prefill_chunk(self, count: int) -> npt.NDArray[np.float32] | None:
        """Run the next tokens of the prompt; logits [info.sampled] with the last ones: its sequence is the last active one then."""

    def drop(self) -> None:
        """Forget the prompt that is being filled in."""

    def release(self, slot: int) -> None:
        """End a sequence; the last active one moves into its slot."""


@dataclass
class FirstDrafts:
    """How the heads' drafts for the next token fared in a text.

    Attributes:
        steps: in which heads drafted.
        right: of them, with the true token among the drafts.
        expected: how many of them should have it, by what was counted before.
    """

    steps: int = 0
    right: int = 0
    expected: float = 0.0

    def see(self, *, came_true: bool, expected: float) -> None:
        """One step more; ``expected`` is its probability."""
        self.steps, self.right, self.expected = self.steps + 1, self.right + came_true, self.expected + expected


@dataclass
class Generation:
    """The answer to one prompt.

    Attributes:
        tokens: generated ids, the end-of-sequence id included when it came.
        finish_reason: "stop" (end of sequence), "length" (max_new_tokens) or "context" (KV cache full).
        accepted: tokens of the answer that each step after the prefill yielded; with the prefill's one they are all of it.
        first_drafts: of the heads, where steps choose their drafts; None where every step has one tree, or none.
        counted_drafts: accepted drafts and all drafts, where the runtime counts them itself.
    """

    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    accepted: list[int] = field(default_factory=list)
    first_drafts: FirstDrafts | None = None
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    backend_ms: float = 0.0
    counted_drafts: tuple[int, int] | None = None

    def keep(self, count: int) -> None:
        """Drop the tokens behind the first ``count``, also from the steps that yielded them."""
        surplus = max(0, len(self.tokens) - count)
        del self.tokens[count:]
        for at in reversed(range(len(self.accepted))):
            taken = min(surplus, self.accepted[at])
            self.accepted[at], surplus = self.accepted[at] - taken, surplus - taken

    @property
    def total_ms(self) -> float:
        """Prefill and decoding."""
        return self.prefill_ms + self.decode_ms
