"""Speed-up by batch size and by prompt length: the same tree on the same engine, without and with it, interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

from medusa_export.core.errors import ConfigError
from medusa_export.engines.decoding.drafters import Drafted, Drafter, TreeDrafter
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE, StepEngine
from medusa_export.engines.decoding.step import decode_step
from medusa_export.engines.measure.side_by_side import compare
from medusa_export.engines.onnxruntime.batch_engine import TreeBatchDecoder
from medusa_export.heads.trees.tree import Tree

Progress = Callable[[int, int], None]


def require_sweeps(batches: Sequence[int], lengths: Sequence[int], *, prompts: int, longest: int) -> None:
    """Raise ConfigError for batch sizes that the prompts do not fill, and for lengths that leave no room for an answer.

    Args:
        batches: batch sizes to measure.
        lengths: prompt lengths to measure, in tokens.
        prompts: how many there are.
        longest: tokens of a prompt that leave room for an answer.
    """
    for batch in batches:
        if not 1 <= batch <= prompts:
            expected = f"1 .. {prompts}, the number of prompts"
            raise ConfigError("--sweep-batch", f"{batch}", expected, "give more prompts or lower it")
    for length in lengths:
        if not 1 <= length <= longest:
            expected = f"1 .. {longest} tokens, so that the answer fits"
            raise ConfigError("--sweep-length", f"{length}", expected, "lower it, or --max-new-tokens")


@dataclass
class Served:
    """All prompts' answers in batches.

    Attributes:
        tokens: of every prompt, in their order.
        steps: of the whole batch; each is one run of the decoder.
        sequence_steps: the same counted for every sequence that was in it.
        decode_seconds: without the prefills.
    """

    tokens: list[list[int]] = field(default_factory=list)
    steps: int = 0
    sequence_steps: int = 0
    decode_seconds: float = 0.0

    @property
    def decoded(self) -> int:
        """Tokens that steps gave: all but the first of each answer."""
        return sum(len(tokens) - 1 for tokens in self.tokens)


def serve(
    decoder: TreeBatchDecoder,
    tree: Tree | Drafter,
    prompts: Sequence[Sequence[int]],
    *,
    batch: int,
    max_new_tokens: int,
) -> Served:
    """Answer all prompts greedily, ``batch`` at once; a sequence that ends makes room for the next prompt.

    Args:
        decoder: with no active sequence.
        tree: of the heads' drafts, or a drafter of this engine.
        batch: sequences at once, at most the decoder's slots.
    """
    result, sequences = Served([[] for _ in prompts]), dict[int, Drafted]()
    drafter: Drafter = TreeDrafter([tree], decoder.info) if isinstance(tree, Tree) else tree
    ends, waiting, active = set(decoder.info.eos_token_ids), list(range(len(prompts)))[::-1], list[int]()
    while waiting or active:
        while waiting and len(active) < batch:
            index = waiting.pop()
            first = int(decoder.admit(prompts[index]).argmax())
            if _extend(result.tokens[index], [first], ends, max_new_tokens) or not decoder.remaining(len(active)):
                decoder.release(len(active))  # its whole answer
                continue
            active.append(index)
            sequences[index] = drafter.begin([*prompts[index], first])
        if not active:
            break
        start = time.perf_counter()
        remaining = min(decoder.remaining(slot) for slot in range(len(active)))
        new = decode_step(decoder, *drafter.draft(decoder, [sequences[index] for index in active], remaining))
        for index, tokens in zip(active, new, strict=True):
            sequences[index].extend(tokens)
        result.decode_seconds += time.perf_counter() - start
        result.steps += 1
        result.sequence_steps += len(active)
        for slot in reversed(range(len(active))):
            tokens = result.tokens[active[slot]]
            if _extend(tokens, new[slot], ends, max_new_tokens) or not decoder.remaining(slot):
                decoder.release(slot)
                active[slot] = active[-1]
                active.pop()
    return result


def batch_sweep(
    decoder: TreeBatchDecoder,
    tree: Tree | Drafter,
    prompts: Sequence[Sequence[int]],
    batches: Sequence[int],
    *,
    max_new_tokens: int,
    repeats: int = 1,
    progress: Progress = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Throughput of every batch size without and with drafts, prefills not counted.

    Args:
        batches: sequences at once; the decoder has as many slots as the largest.
    """
    runs: dict[tuple[int, bool], list[Served]] = {}
    total = 2 * repeats * len(batches)
    for repeat in range(repeats):
        for index, batch in enumerate(batches):
            for with_tree in (False, True) if (repeat + index) % 2 else (True, False):
                mode = tree if with_tree else AUTOREGRESSIVE
                run = serve(decoder, mode, prompts, batch=batch, max_new_tokens=max_new_tokens)
                runs.setdefault((batch, with_tree), []).append(run)
                progress(sum(map(len, runs.values())), total)
    return [_batch_row(batch, runs[batch, False], runs[batch, True]) for batch in batches]


def length_sweep(
    engine: StepEngine,
    tree: Tree | Drafter,
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    max_new_tokens: int,
    repeats: int = 1,
    progress: Progress = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Speed-up behind prompts of given lengths, prefills not counted.

    A prompt that is shorter gets others' texts before it, and what is too much at the front is cut.

    Args:
        engine: what runs.
        tree: compared with no tree.
        prompts: token ids.
        lengths: of prompts, in tokens.
        max_new_tokens: most tokens of an answer.
        repeats: runs of each prompt.
        progress: called with (done, total) answers.
    """
    rows = []
    for index, length in enumerate(lengths):
        (found,) = compare(
            engine, [tree], [stretched(prompts, at, length) for at in range(len(prompts))],
            max_new_tokens=max_new_tokens, repeats=repeats,
            progress=partial(_progress_of, progress, index, len(lengths)),
        )  # fmt: skip
        rows.append(
            {
                "prompt_length": length,
                "tokens_per_step": _rounded(found.tokens_per_step),
                "speedup": _rounded(found.speedup),
                "speedup_ci95": [round(value, 4) for value in found.interval] if found.interval else None,
            }
        )
    return rows


def stretched(prompts: Sequence[Sequence[int]], at: int, length: int) -> list[int]:
    """A prompt of exactly ``length`` tokens that ends as prompt ``at`` does; in front of it are the ones before, in a circle.

    Args:
        prompts: token ids.
        at: index of the prompt that comes last.
        length: tokens.
    """
    text: list[int] = []
    while len(text) < length:
        text = [*prompts[at % len(prompts)], *text]
        at -= 1
    return text[-length:]


def _extend(tokens: list[int], new: Sequence[int], ends: set[int], limit: int) -> bool:
    """Append until the answer ends; whether it has."""
    for token in new:
        tokens.append(token)
        if token in ends or len(tokens) >= limit:
            return True
    return False


def _batch_row(batch: int, without: Sequence[Served], with_tree: Sequence[Served]) -> dict[str, Any]:
    """Figures of a batch size; no speeds where every answer is one token, which no step decodes."""
    sides = {"baseline": without, "medusa": with_tree}
    has_steps = all(runs[0].steps for runs in sides.values())
    speeds = {
        mode: median(run.decoded / run.decode_seconds for run in runs) for mode, runs in sides.items() if has_steps
    }
    steps = {
        mode: median(1e3 * run.decode_seconds / run.steps for run in runs) for mode, runs in sides.items() if has_steps
    }
    return {
        "batch": batch,
        "tokens_per_second": {mode: round(speeds[mode], 3) if has_steps else None for mode in sides},
        "speedup": round(speeds["medusa"] / speeds["baseline"], 4) if has_steps else None,
        "tokens_per_step": round(with_tree[0].decoded / with_tree[0].sequence_steps, 4) if has_steps else 1.0,
        "step_ms": {mode: round(steps[mode], 4) if has_steps else 0.0 for mode in sides},
        "equal_outputs": sum(
            ours == theirs for ours, theirs in zip(without[0].tokens, with_tree[0].tokens, strict=True)
        ),
        "prompts": len(without[0].tokens),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _progress_of(progress: Progress, index: int, count: int, done: int, total: int) -> None:
    """Progress within one of several equal runs, as progress of them all."""
    progress(index * total + done, count * total)
