"""What an engine is, and the one greedy decode loop that serves every engine that can run single steps."""

from __future__ import annotations

import time
from collections.abc import Sequence

from medusa_export.core.errors import ConfigError
from medusa_export.engines.decoding.drafters import Drafter, TreeDrafter
from medusa_export.engines.decoding.protocols import Generation, StepEngine, WholeEngine
from medusa_export.engines.decoding.single_slot import OneSequence
from medusa_export.engines.decoding.step import decode_step
from medusa_export.heads.decoding.accept import Typical
from medusa_export.heads.decoding.sampling import Sampler
from medusa_export.heads.trees.tree import Tree


def generate(
    engine: StepEngine | WholeEngine,
    input_ids: Sequence[int],
    tree: Tree | Drafter,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    sampler: Sampler | None = None,
    typical: Typical | None = None,
) -> Generation:
    """Greedy decoding; lossless: the tree changes the speed, not the tokens. An empty tree is autoregressive decoding.

    Args:
        tree: of the heads' drafts, or a drafter of this engine.
        sampler: draw tokens with it instead; with the same seed, a tree changes the speed only here too.
        typical: with a sampler, let drafts stand by this rule instead: not lossless.

    Raises:
        ConfigError: a prompt that fills the context, or with a token that the model does not have.
    """
    if not 0 < len(input_ids) < engine.info.max_length:
        got, limit = f"{len(input_ids)} tokens", engine.info.max_length
        raise ConfigError("prompt", got, f"1 .. {limit - 1}", "shorten it, or export with a larger --max-length")
    engine.info.require_known(input_ids)
    if not isinstance(engine, WholeEngine):
        drafter = TreeDrafter([tree], engine.info) if isinstance(tree, Tree) else tree
        return _decode_by_steps(engine, input_ids, drafter, max_new_tokens, eos_token_ids, sampler, typical)
    if sampler is not None or typical is not None:
        got = f"the engine {engine.info.backend}, which draws with random numbers of its own"
        raise ConfigError("temperature", got, "greedy decoding", "leave --temperature out")
    if not isinstance(tree, Tree):
        got = f"the engine {engine.info.backend}, whose runtime drafts with its own heads"
        raise ConfigError("--drafts", got, "heads or none", "leave --drafts out")
    return engine.decode(input_ids, tree, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids)


def _decode_by_steps(
    engine: StepEngine, input_ids: Sequence[int], drafter: Drafter, max_new_tokens: int, eos_token_ids: Sequence[int],
    sampler: Sampler | None, typical: Typical | None,
) -> Generation:  # fmt: skip
    result, eos, decoder = Generation(), set(eos_token_ids), OneSequence(engine)
    decoder.prepare(drafter.trees, drafter.depths)
    start = time.perf_counter()
    first = sampler.draw(engine.prefill_logits(input_ids)) if sampler else engine.prefill(input_ids)
    result.tokens.append(first)
    new, sequence = [first], drafter.begin([*input_ids, first])
    decode_start, backend_start = time.perf_counter(), engine.backend_seconds
    while not (reason := _finished(result.tokens, new, eos, max_new_tokens)):
        remaining = engine.info.max_length - engine.length
        if not remaining:
            reason = "context"
            break
        (new,) = decode_step(decoder, *drafter.draft(decoder, (sequence,), remaining), (sampler,), typical)
        sequence.extend(new)
        result.tokens += new
        result.accepted.append(len(new))
    result.first_drafts = sequence.first_drafts
    result.finish_reason = _cut(result, eos, max_new_tokens) or reason
    result.prefill_ms = (decode_start - start) * 1e3
    result.decode_ms = (time.perf_counter() - decode_start) * 1e3
    result.backend_ms = (engine.backend_seconds - backend_start) * 1e3
    return result


def _finished(tokens: list[int], new: list[int], eos: set[int], max_new_tokens: int) -> str:
    """The reason to stop, or an empty string. Ends of sequence can only be among the tokens that are new."""
    if not eos.isdisjoint(new):
        return "stop"
    return "length" if len(tokens) >= max_new_tokens else ""


def _cut(result: Generation, eos: set[int], max_new_tokens: int) -> str:
    """Drop what a step produced past the limit or the end of sequence; the reason that follows from what is left."""
    ends = (index + 1 for index, token in enumerate(result.tokens[:max_new_tokens]) if token in eos)
    end = next(ends, None)
    result.keep(max_new_tokens if end is None else end)
    if end is not None:
        return "stop"
    return "length" if len(result.tokens) >= max_new_tokens else ""
