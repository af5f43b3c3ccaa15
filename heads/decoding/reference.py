"""Reference decoding in PyTorch: what every engine's tokens and accepted counts are compared with. Clear, not fast.

Nothing is shared with the engines but the tree and the acceptance: no ONNX, no KV cache under the tree, no step loop. Source: Medusa
(arXiv 2401.10774, 2.1 and 2.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from medusa_export.core.errors import ConfigError
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.decoding.accept import accept_greedy
from medusa_export.heads.trees.tree import Tree


def greedy(model: Any, input_ids: Sequence[int], *, max_new_tokens: int, eos_token_ids: Sequence[int]) -> list[int]:
    """Autoregressive decoding, a token a step, with transformers' own KV cache.

    Args:
        model: a transformers causal LM, see :func:`medusa_export.heads.checkpoint.medusa_checkpoint.load_reference`.
        input_ids: the prompt.  # [S]

    Returns:
        generated ids, the end-of-sequence id included when it came.
    """
    tokens: list[int] = []
    block, cache = list(input_ids), None
    with torch.no_grad():
        while len(tokens) < max_new_tokens and not (tokens and tokens[-1] in eos_token_ids):
            output = model(input_ids=torch.tensor([block]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            block = [int(output.logits[0, -1].argmax())]
            tokens += block
    return tokens


def medusa_decode(
    model: Any,
    checkpoint: MedusaCheckpoint,
    input_ids: Sequence[int],
    tree: Tree,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
) -> tuple[list[int], list[int]]:
    """Greedy decoding with the checkpoint's heads; every step runs the whole text again, so no stale row can hide.

    Args:
        model: the checkpoint's base in transformers.
        input_ids: the prompt.  # [S]

    Returns:
        generated ids, as :func:`greedy`; and how many of them each step after the first token yielded.

    Raises:
        TreeError: a tree deeper than there are heads.
        ConfigError: a sliding window that the text could outgrow: the tree's mask has none.
    """
    tree.require_heads(checkpoint.num_medusa_heads)
    longest, window = len(input_ids) + max_new_tokens + tree.num_nodes, checkpoint.config.sliding_window
    if window and longest > window:
        raise ConfigError("sliding_window", str(window), f"at least {longest}", "decode fewer tokens")
    text, accepted = list(input_ids), list[int]()  # text: all but the newest token
    hidden, next_ids = verify_tree(model, text[:-1], Tree(()), text[-1:])
    hidden, tokens = hidden[0], next_ids.tolist()
    while len(tokens) < max_new_tokens and not set(tokens) & set(eos_token_ids):
        drafts = head_logits(checkpoint, hidden).topk(tree.top_k).indices.numpy()  # [H, top_k]
        node_ids = np.concatenate([tokens[-1:], drafts[tree.heads_and_ranks]])  # [N]
        states, next_ids = verify_tree(model, text, tree, node_ids.tolist())
        path, new = accept_greedy(tree, node_ids, next_ids)
        text += node_ids[path].tolist()
        tokens += new
        accepted.append(len(path))
        hidden = states[path[-1]]
    answer = _until_eos(tokens[:max_new_tokens], eos_token_ids)
    if accepted:
        accepted[-1] -= len(tokens) - len(answer)
    return answer, accepted


def verify_tree(
    model: Any, text: Sequence[int], tree: Tree, node_ids: Sequence[int]
) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
    """The base model on a text and on every node of a tree behind it, in one pass.

    Args:
        text: the tokens before the root; may be empty.  # [S]
        node_ids: the tokens of the tree, the root first.  # [N]

    Returns:
        hidden states after the final norm, [N, hidden_size], and the greedy next token after every node, [N].
    """
    past, total = len(text), len(text) + tree.num_nodes
    visible = torch.ones(total, total, dtype=torch.bool).tril()
    visible[past:, past:] = torch.from_numpy(tree.mask)
    mask = torch.zeros(1, 1, total, total, dtype=model.dtype)
    mask.masked_fill_(~visible, torch.finfo(model.dtype).min)
    positions = np.concatenate([np.arange(past), past + tree.depths])  # [S + N]
    with torch.no_grad():
        output = model.model(
            input_ids=torch.tensor([[*text, *node_ids]]),
            attention_mask=mask,
            position_ids=torch.from_numpy(positions)[None],
            use_cache=False,
        )
        hidden = output.last_hidden_state[0, past:]  # [N, D]
        return hidden, model.lm_head(hidden).argmax(-1).numpy()


def head_logits(checkpoint: MedusaCheckpoint, hidden: torch.Tensor) -> torch.Tensor:
    """What every head predicts from one hidden state: residual blocks ``x + silu(W x + b)``, then its lm_head.

    Args:
        hidden: after the base model's final norm.  # [hidden_size]

    Returns:
        in the dtype of ``hidden``.  # [H, vocab_size]
    """
    layers, logits = checkpoint.num_medusa_layers, []
    for head in range(checkpoint.num_medusa_heads):
        x = hidden  # [D]
        for layer in range(layers):
            name = f"medusa_heads.{head}.{layer}.linear"
            weight, bias = (checkpoint.read(f"{name}.{part}").to(x.dtype) for part in ("weight", "bias"))
            x = x + functional.silu(functional.linear(x, weight, bias))
        logits.append(functional.linear(x, checkpoint.read(f"medusa_heads.{head}.{layers}.weight").to(x.dtype)))
    return torch.stack(logits)


def _until_eos(tokens: list[int], eos_token_ids: Sequence[int]) -> list[int]:
    """The tokens up to and with the first end of sequence."""
    ends = (index + 1 for index, token in enumerate(tokens) if token in eos_token_ids)
    return tokens[: next(ends, len(tokens))]
