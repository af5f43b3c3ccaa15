"""What a run is checked for besides speed and parity: logits of tree nodes, greedy choices, prompts, and where answers end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medusa_export.core.json_fields import read_json
from medusa_export.engines.decoding.protocols import Generation, ScoringEngine
from medusa_export.engines.verify.parity import logit_noise
from medusa_export.engines.verify.selfcheck import tree_error
from medusa_export.heads.trees.tree import Tree

SAMPLED_STEPS = 3  # of a run, on which a tree step is compared with its paths
SAMPLED_PATHS = 6  # of a large tree
BLOCK_TOKENS = 32  # of an answer, on which the noise of a block is measured
NOISE_FACTOR = 4.0  # the largest of many nodes, against the largest of some positions
FLOAT_STEP = 2.0**-20  # of the largest logit: where single steps and blocks happen to agree bit by bit


def sampled_tree_error(
    engine: ScoringEngine, tree: Tree, texts: Sequence[tuple[list[int], list[int]]], seed: int
) -> tuple[float, float]:
    """The largest difference between a tree step and its paths on some steps of a run, and its bound from measured noise.

    With products of integers there is no difference, but for one step in a hundred in which a code fell the other way: there it is
    the smallest one. A wrong mask, parent or position is in all steps.

    Args:
        tree: the run's.
        texts: prompt and answer.
    """
    drawn, errors, bound = np.random.default_rng(seed), [0.0], 0.0
    usable = [
        (prompt, answer) for prompt, answer in texts if answer and len(prompt) + tree.num_nodes < engine.info.max_length
    ]
    for number in drawn.permutation(len(usable))[:SAMPLED_STEPS]:
        prompt, answer = usable[number]
        room = engine.info.max_length - tree.num_nodes - len(prompt)
        text = [*prompt, *answer[: int(drawn.integers(1, min(len(answer), room) + 1))]]
        bound = max(bound, NOISE_FACTOR * _block_noise(engine, text))
        errors.append(tree_error(engine, text, _some_paths(tree, drawn)))
    found = np.min(errors[1:] or errors) if engine.info.exact_products else np.max(errors)  # both keep NaN
    return float(found), bound


def _some_paths(tree: Tree, drawn: Any) -> Tree:
    """Some of the longest paths of a tree, with all that is above them: each costs single steps of its own."""
    leaves = tree.retrieve_indices
    if len(leaves) <= SAMPLED_PATHS:
        return tree
    rows = drawn.permutation(len(leaves))[:SAMPLED_PATHS]
    nodes = sorted({int(node) for row in rows for node in leaves[row] if node > 0})
    return Tree.from_choices(tree.choices[node - 1] for node in nodes)


def _block_noise(engine: ScoringEngine, text: Sequence[int]) -> float:
    """How far logits of single steps are from those of a causal block; no tree, mask or parent is in it."""
    part = list(text[-BLOCK_TOKENS:])
    start = len(text) - len(part) or 1
    single = np.concatenate(list(engine.score(text, chunk=1, start=start)))
    block = np.concatenate(list(engine.score(text, chunk=len(text) - start, start=start)))
    return float(np.abs(single - block).max()) + FLOAT_STEP * float(np.abs(single).max())


def choice_findings(
    engine: ScoringEngine, texts: Sequence[tuple[str, list[int], Generation]], tolerance: float
) -> list[str]:
    """Tokens that were generated and are not the engine's greedy choice, by a way of its own: the text scored in blocks.

    With the comparison of those scores with the checkpoint's, this says that each token is the checkpoint's choice, as far as the
    precision goes.

    Args:
        texts: name of the prompt, prompt, and what was generated.
        tolerance: gap in logits that numerical noise may turn round; where it does not do, the noise of the blocks is measured.
    """
    found = []
    for name, prompt, run in texts:
        answer = run.tokens
        chunk, start = 64, len(prompt) - 1
        if (
            engine.info.exact_products
        ):  # as it was decoded: then there is no noise at all; the prefill chose the first token
            chunk, start, answer = 1, len(prompt), answer[1:]
        text = [*prompt, *run.tokens[:-1]]
        if not answer:
            continue
        scored = np.concatenate(list(engine.score(text, chunk=chunk, start=start)))
        logits = scored[-len(answer) :, : engine.info.sampled]  # [A, V]
        gaps = logits.max(axis=-1) - logits[np.arange(len(answer)), answer]
        step = FLOAT_STEP * float(np.abs(logits).max())
        allowed = 2 * tolerance + step
        if chunk > 1 and not (gaps <= allowed).all():  # the tolerance is that of a tree's steps, or of none
            allowed = 2 * max(tolerance, logit_noise(engine, prompt, run.tokens, chunk)) + step
        wrong = np.flatnonzero(~(gaps <= allowed))  # NaN too
        if len(wrong):
            verb = "is" if len(wrong) == 1 else "are"
            found.append(
                f"prompt {name}: {len(wrong)} of {len(answer)} tokens {verb} not the greedy choice, the first at {wrong[0]}: "
                f"its logit is {gaps[wrong[0]]:.3g} below the best one's, noise is {allowed:.2g}"
            )
    return found


def end_findings(
    checkpoint: Path, texts: Sequence[tuple[str, list[int], Generation]], max_new_tokens: int
) -> list[str]:
    """Answers that end where the checkpoint's would not, or go on where its would end.

    Args:
        checkpoint: Hugging Face directory.
        texts: (name, prompt, answer) of each.
        max_new_tokens: most tokens of an answer.
    """
    ends = end_ids(checkpoint)
    found = []
    for name, _, run in texts:
        inside = [index for index, token in enumerate(run.tokens[:-1]) if token in ends]
        last = run.tokens[-1] if run.tokens else None
        if inside:
            found.append(f"prompt {name}: token {inside[0]} ends the checkpoint's answers, and this one goes on")
        elif run.finish_reason == "stop" and last not in ends:
            found.append(
                f"prompt {name}: the answer ends with {last}, which does not end the checkpoint's ({sorted(ends)})"
            )
        elif run.finish_reason == "length" and len(run.tokens) < max_new_tokens and last not in ends:
            found.append(
                f"prompt {name}: the answer ends after {len(run.tokens)} of {max_new_tokens} tokens, for no reason"
            )
    return found


def end_ids(checkpoint: Path) -> set[int]:
    """End-of-sequence ids of a checkpoint, read from its files: generation_config.json goes before config.json."""
    for name in ("generation_config.json", "config.json"):
        body: Mapping[str, Any] = read_json(checkpoint / name) if (checkpoint / name).is_file() else {}
        ids = body.get("eos_token_id")
        if ids is not None:
            return set(ids) if isinstance(ids, list) else {int(ids)}
    return set()


def prompt_findings(checkpoint: Path, encoded: Sequence[tuple[str, Sequence[dict[str, str]], list[int]]]) -> list[str]:
    """Prompts that were not encoded whole, as the checkpoint's own tokenizer and template have them.

    Args:
        encoded: name, messages, and the ids that the engine was given.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    special = set(tokenizer.all_special_tokens)
    found = []
    for name, messages, ids in encoded:
        if any(token in message["content"] for message in messages for token in special):
            continue  # text that spells a special token is kept as text, by a way that is not looked at here
        text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        again = tokenizer(text, add_special_tokens=False)["input_ids"]
        if list(again) != list(ids):
            found.append(
                f"prompt {name}: the engine was given {len(ids)} tokens; the checkpoint's tokenizer makes {len(again)}, others"
            )
    return found
