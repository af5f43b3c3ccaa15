"""What an engine is, and the one greedy decode loop that serves every engine that can run single steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from medusa_export.core.errors import ConfigError
from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.decoding.accept import Typical, accept_drawn, accept_greedy, accept_typical
from medusa_export.heads.decoding.sampling import Sampler
from medusa_export.heads.trees.tree import Tree

AUTOREGRESSIVE = Tree(())


class Step(Protocol):
    """One tree bound to an engine's buffers."""

    def verify(self, node_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Run the base model on all nodes; its greedy next token after each.  # [N] -> [N]"""

    def verify_logits(self, node_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """As :meth:`verify`, but all logits.  # [N] -> [N, vocab_size]"""

    def keep(self, path: npt.NDArray[np.int64]) -> None:
        """Make the accepted nodes the newest rows of the KV cache and drop the others."""


class StepEngine(Protocol):
    """An engine whose steps this process drives; the decode loop below does the rest."""

    info: EngineInfo

    def prefill(self, input_ids: Sequence[int]) -> int:
        """Empty the KV cache, run the prompt, and return the greedy next token."""

    def prefill_logits(self, input_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """As :meth:`prefill`, but the logits of the next token.  # [S] -> [vocab_size]"""

    def prepare(self, tree: Tree) -> Step:
        """Bind a tree; cheap after the first time."""

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


@runtime_checkable
class WholeEngine(Protocol):
    """An engine whose runtime decodes whole answers; this process cannot drive its steps."""

    info: EngineInfo

    def decode(
        self, input_ids: Sequence[int], tree: Tree, *, max_new_tokens: int, eos_token_ids: Sequence[int]
    ) -> Generation:
        """One greedy answer, up to the first end-of-sequence id, with it."""


class TreeDecoder(Protocol):
    """Sequences in slots ``0 .. active - 1``, whose steps the scheduler drives; slots that are in use come first."""

    info: EngineInfo
    max_length: int
    slots: int
    active: int

    def room(self, slot: int) -> int:
        """Tokens that still fit."""

    def begin(self, input_ids: Sequence[int]) -> None:
        """Prepare a prompt that :meth:`fill` runs in parts, with steps of the others in between."""

    def fill(self, count: int) -> npt.NDArray[np.float32] | None:
        """Run so many tokens of the prompt; logits [vocab_size] with the last ones: its sequence is the last active one then."""

    def drop(self) -> None:
        """Forget the prompt that is being filled in."""

    def draft(self, depth: int) -> npt.NDArray[np.int64]:
        """Candidates of the first heads for every active sequence.  # [active, depth, top_k]"""

    def verify(self, tree: Tree, node_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The base model's greedy next token after every node.  # [active, N] -> [active, N]"""

    def verify_logits(self, tree: Tree, node_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """As :meth:`verify`, but all logits.  # [active, N] -> [active, N, vocab_size]"""

    def keep(self, paths: Sequence[npt.NDArray[np.int64]]) -> None:
        """Make every sequence's accepted nodes the newest rows of its cache, and drop the others."""

    def release(self, slot: int) -> None:
        """End a sequence; the last active one moves into its slot."""


@dataclass
class Generation:
    """What one prompt gave.

    Attributes:
        tokens: generated ids, the end-of-sequence id included when it came.
        finish_reason: "stop" (end of sequence), "length" (max_new_tokens) or "context" (KV cache full).
        accepted: tokens that each step after the prefill yielded.
        counted_drafts: accepted drafts and all drafts, where the runtime counts them itself.
    """

    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    accepted: list[int] = field(default_factory=list)
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    backend_ms: float = 0.0
    counted_drafts: tuple[int, int] | None = None

    @property
    def total_ms(self) -> float:
        """Prefill and decoding."""
        return self.prefill_ms + self.decode_ms


def generate(
    engine: StepEngine | WholeEngine,
    input_ids: Sequence[int],
    tree: Tree,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    sampler: Sampler | None = None,
    typical: Typical | None = None,
) -> Generation:
    """Greedy decoding; lossless: the tree changes the speed, not the tokens. An empty tree is autoregressive decoding.

    Args:
        sampler: draw tokens with it instead; with the same seed, a tree changes the speed only here too.
        typical: with a sampler, let drafts stand by this rule instead: not lossless.

    Raises:
        ConfigError: a prompt that fills the context.
    """
    if not 0 < len(input_ids) < engine.info.max_length:
        got, limit = f"{len(input_ids)} tokens", engine.info.max_length
        raise ConfigError("prompt", got, f"1 .. {limit - 1}", "shorten it, or export with a larger --max-length")
    if not isinstance(engine, WholeEngine):
        return _decode_by_steps(engine, input_ids, tree, max_new_tokens, eos_token_ids, sampler, typical)
    if sampler is not None or typical is not None:
        got = f"the engine {engine.info.backend}, which draws with random numbers of its own"
        raise ConfigError("temperature", got, "greedy decoding", "leave --temperature out")
    return engine.decode(input_ids, tree, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids)


def _decode_by_steps(
    engine: StepEngine, input_ids: Sequence[int], tree: Tree, max_new_tokens: int, eos_token_ids: Sequence[int],
    sampler: Sampler | None, typical: Typical | None,
) -> Generation:  # fmt: skip
    result, eos = Generation(), set(eos_token_ids)
    start = time.perf_counter()
    first = sampler.draw(engine.prefill_logits(input_ids)) if sampler else engine.prefill(input_ids)
    result.tokens.append(first)
    decode_start, backend_start = time.perf_counter(), engine.backend_seconds
    while not (reason := _finished(result.tokens, eos, max_new_tokens)):
        room = engine.info.max_length - engine.length
        if not room:
            reason = "context"
            break
        result.tokens += _step(engine, tree if room >= tree.num_nodes else AUTOREGRESSIVE, result, sampler, typical)
    result.finish_reason = _cut(result.tokens, eos, max_new_tokens) or reason
    result.prefill_ms = (decode_start - start) * 1e3
    result.decode_ms = (time.perf_counter() - decode_start) * 1e3
    result.backend_ms = (engine.backend_seconds - backend_start) * 1e3
    return result


def _step(
    engine: StepEngine, tree: Tree, result: Generation, sampler: Sampler | None, typical: Typical | None
) -> list[int]:
    """Draft, verify, accept, keep. Returns the new tokens: the accepted drafts and the base model's own next one."""
    step = engine.prepare(tree)
    node_ids = np.empty(tree.num_nodes, dtype=np.int64)
    node_ids[0] = result.tokens[-1]
    if tree.max_draft_len:
        node_ids[1:] = engine.draft(tree.depth)[tree.heads_and_ranks]
    if sampler:
        logits = step.verify_logits(node_ids)
        if typical:
            path = accept_typical(tree, node_ids, logits, sampler.temperature, typical)
            tokens = [*node_ids[path[1:]].tolist(), sampler.draw(logits[path[-1]])]
        else:
            path, tokens = accept_drawn(tree, node_ids, lambda node: sampler.draw(logits[node]))
    else:
        next_ids = step.verify(node_ids)
        path = accept_greedy(tree, node_ids, next_ids)
        tokens = next_ids[
            path
        ].tolist()  # the base model's choice after each accepted node, which is the next node's token
    step.keep(path)
    result.accepted.append(len(tokens))
    return tokens


def _finished(tokens: list[int], eos: set[int], max_new_tokens: int) -> str:
    """The reason to stop, or an empty string."""
    if eos and not eos.isdisjoint(tokens[-17:]):  # one step adds at most 17 tokens
        return "stop"
    return "length" if len(tokens) >= max_new_tokens else ""


def _cut(tokens: list[int], eos: set[int], max_new_tokens: int) -> str:
    """Drop what a step produced past the limit or the end of sequence; the reason that follows from what is left."""
    del tokens[max_new_tokens:]
    for index, token in enumerate(tokens):
        if token in eos:
            del tokens[index + 1 :]
            return "stop"
    return "length" if len(tokens) >= max_new_tokens else ""
