"""ModelOpt's Medusa form of a transformers causal LM, without its traps, and the loss that its heads are trained with.

ModelOpt's own forward is not used for training. Its labels are not shifted (head ``h`` would learn token t + 1 + h from plain
labels), it averages every head over the micro-batch (gradient accumulation then weighs short answers more), it ignores
``num_items_in_batch`` although it seems to take it, and the base stays still unless ``freeze_base_model=False`` reaches it. The
loss is computed here from the decoder's hidden states, the same for every head, and with labels exactly as the text has them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from medusa_export.core.errors import ConfigError, missing_package
from medusa_export.heads.checkpoint.head_layouts import BLOCK_BIAS, BLOCK_WEIGHT, HEAD_LM_HEAD

HEADS = "medusa_heads"
NO_LABEL = -100
STATISTICS = 3  # of every part: targets, hits, negative log likelihood


def convert(model: Any, *, heads: int, layers: int, share_lm_head: bool = False) -> Any:
    """Give a causal LM Medusa heads through ModelOpt; they start as the base model's own next-token prediction.

    ModelOpt leaves random biases and random vocabulary projections. Here every block is the identity (weight and bias zero) and
    every projection a copy of the base's, so nothing random is left.

    Args:
        model: a transformers causal LM; changed in place.
        heads, layers: heads, and residual blocks of each; at least one.
        share_lm_head: all heads use the base's projection itself, and nothing has to be stored for them.

    Returns:
        the same object, of a class of ModelOpt's.

    Raises:
        ConfigError: no heads, or no layers.
        MissingPackageError: ModelOpt is not installed.
    """
    for what, number in (("heads", heads), ("layers", layers)):
        if number < 1:
            raise ConfigError(f"number of {what}", str(number), "at least 1", "correct it")
    try:
        import modelopt.torch.speculative as mtsp
    except ImportError as error:
        raise missing_package("nvidia-modelopt", "train") from error
    with torch.random.fork_rng(devices=[]):  # what it draws is overwritten: the caller's random numbers stay his
        mtsp.convert(model, [("medusa", {"medusa_num_heads": heads, "medusa_num_layers": layers})])
    with torch.no_grad():
        for head in model.medusa_heads:
            for block in head[:-1]:
                block.linear.weight.zero_()
                block.linear.bias.zero_()
            if share_lm_head:
                head[-1].weight = model.lm_head.weight
            else:
                head[-1].weight.copy_(model.lm_head.weight)
    return model


def load_heads(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Continue from existing heads.

    Args:
        model: what :func:`convert` returned.
        tensors: canonical name -> tensor, of as many heads and layers; without projections where the model shares its own.

    Raises:
        ConfigError: a tensor is missing, left over or has another shape.
    """
    targets = own_head_parameters(model)
    for name in sorted(targets.keys() ^ tensors.keys()):
        got = "no such tensor" if name in targets else "a tensor without a place"
        raise ConfigError(name, got, f"the {len(targets)} tensors of the model's heads", "check heads and layers")
    with torch.no_grad():
        for name, parameter in targets.items():
            if tensors[name].shape != parameter.shape:
                raise ConfigError(name, str(tuple(tensors[name].shape)), str(tuple(parameter.shape)), "check the heads")
            parameter.copy_(tensors[name])


def head_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Canonical name -> parameter of the model, a shared projection included; see ``head_formats``."""
    found = {}
    for index, head in enumerate(model.medusa_heads):
        for layer, block in enumerate(head[:-1]):
            found[BLOCK_WEIGHT.format(index, layer)] = block.linear.weight
            found[BLOCK_BIAS.format(index, layer)] = block.linear.bias
        found[HEAD_LM_HEAD.format(index, len(head) - 1)] = head[-1].weight
    return found


def own_head_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The same without a projection that is the base's own."""
    return {name: value for name, value in head_parameters(model).items() if value is not model.lm_head.weight}


def save_combined(model: Any, out: Path) -> None:
    """Base and heads in one Hugging Face directory, as ModelOpt restores it; plain transformers drops the heads when it loads it."""
    import modelopt.torch.opt as mto

    with redirect_stdout(sys.stderr):  # a command's stdout is for its result
        mto.enable_huggingface_checkpointing()
    for head in model.medusa_heads:
        if head[-1].weight is model.lm_head.weight:  # safetensors refuses one memory under two names
            head[-1].weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with redirect_stdout(sys.stderr):
        model.save_pretrained(out)


def head_targets(labels: torch.Tensor, heads: int) -> torch.Tensor:
    """What every position has to predict: the base the next token, head ``h`` the one ``h + 2`` ahead.

    A position counts where decoding visits it: the token after it is the answer's, and so is everything up to the target.

    Args:
        labels: token ids, -100 outside answers, not shifted.  # int64 [B, S]

    Returns:
        token ids or -100; first the base's.  # int64 [B, S, 1 + heads]
    """
    inside = torch.ones_like(labels, dtype=torch.bool)
    found = []
    for ahead in range(1, heads + 2):
        target = torch.full_like(labels, NO_LABEL)  # [B, S]
        target[:, : max(labels.shape[1] - ahead, 0)] = labels[:, ahead:]
        inside = inside & (target != NO_LABEL)
        found.append(target.where(inside, NO_LABEL))
    return torch.stack(found, dim=-1)


@dataclass(frozen=True)
class MedusaLoss:
    """The loss of one batch.

    Attributes:
        loss: the weighted sum that is trained.  # float32 []
        parts: targets, hits of the most likely token and sum of negative log likelihoods, of every sequence: of the base, then
            of every head.  # float32 [B, 1 + heads, 3]
        drift: sum over answer tokens of KL(teacher || base), of every sequence; zeros without a teacher.  # float32 [B]
    """

    loss: torch.Tensor
    parts: torch.Tensor
    drift: torch.Tensor


def medusa_loss(
    model: Any,
    batch: Mapping[str, torch.Tensor],
    *,
    freeze_base: bool,
    head_weights: Sequence[float],
    base_weight: float = 1.0,
    teacher: torch.Tensor | None = None,
    items: torch.Tensor | int | None = None,
) -> MedusaLoss:
    """Cross-entropy of the heads, and for a base that is trained its own; sums over answer tokens divided by one number of tokens.

    Dividing by the tokens of all micro-batches and processes, rather than by each one's own, is what makes accumulated gradients
    those of one large batch.

    Args:
        model: what :func:`convert` returned; its decoder, lm_head and heads are called, not its forward.
        batch: input_ids and attention_mask, padded on the right, and labels: see :func:`head_targets`.  # int64 [B, S] each
        freeze_base: the decoder runs without gradients and the base adds no loss.
        head_weights: of the heads, for instance 0.8 ** h.
        base_weight: of the base model's loss.
        teacher: log-probabilities that the base is held to instead of the text's tokens, see :func:`base_logits`.  # [R, V]
        items: answer tokens to divide by; None counts those of this batch, one at least.

    Raises:
        ConfigError: the number of weights is not the number of heads.
    """
    if len(head_weights) != len(model.medusa_heads):
        got, expected = f"{len(head_weights)} weights", f"{len(model.medusa_heads)}, one a head"
        raise ConfigError("head weights", got, expected, "correct them")
    targets = head_targets(batch["labels"], len(head_weights))
    rows = targets[..., 0] != NO_LABEL  # [B, S], R of them true
    with torch.set_grad_enabled(torch.is_grad_enabled() and not freeze_base):
        hidden = decoder_states(model, batch)[rows]  # [R, D]
        logits = model.lm_head(hidden).float()  # [R, V]
    targets = targets[rows]  # [R, 1 + heads]
    losses, parts = [], []
    for part in range(1 + len(head_weights)):
        if part:
            head = model.medusa_heads[part - 1]
            logits = head(hidden.to(head[0].linear.weight.dtype)).float()
        nll = functional.cross_entropy(logits, targets[:, part], ignore_index=NO_LABEL, reduction="none")  # [R]
        parts.append(_statistics(logits, targets[:, part], nll))
        drift = _divergence(teacher, logits) if part == 0 and teacher is not None else None
        losses.append(nll if drift is None else drift)
    weights = [0.0 if freeze_base else base_weight, *head_weights]
    divisor = rows.sum().clamp_min(1) if items is None else items
    total = sum(weight * loss.sum() for weight, loss in zip(weights, losses, strict=True) if weight) / divisor
    sequences = rows.nonzero()[:, 0]  # [R]
    drift_sum = losses[0].detach() if teacher is not None else torch.zeros_like(losses[0])
    return MedusaLoss(
        torch.as_tensor(total, device=hidden.device),
        _by_sequence(torch.stack(parts, dim=1), sequences, len(rows)),
        _by_sequence(drift_sum, sequences, len(rows)),
    )


def decoder_states(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Hidden states after the final norm.  # [B, S, D]"""
    output = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    states: torch.Tensor = output.last_hidden_state
    return states


def base_logits(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Log-probabilities of the base model wherever the next token is an answer's: the teacher of :func:`medusa_loss`.  # [R, V]"""
    rows = head_targets(batch["labels"], 0)[..., 0] != NO_LABEL
    with torch.no_grad():
        return functional.log_softmax(model.lm_head(decoder_states(model, batch)[rows]).float(), dim=-1)


def _divergence(teacher: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(teacher || model) of every row.  # log-probabilities [R, V], logits [R, V] -> [R]"""
    student = functional.log_softmax(logits, dim=-1)
    return functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def _statistics(logits: torch.Tensor, target: torch.Tensor, nll: torch.Tensor) -> torch.Tensor:
    """Whether there is a target, whether it was the most likely token, and its negative log likelihood.  # [R, 3]"""
    hits = logits.detach().argmax(-1) == target  # no token is -100
    return torch.stack([(target != NO_LABEL).float(), hits.float(), nll.detach()], dim=-1)


def _by_sequence(values: torch.Tensor, sequences: torch.Tensor, count: int) -> torch.Tensor:
    """Sums of rows by the sequence that they are from.  # [R, ...] -> [count, ...]"""
    return values.new_zeros(count, *values.shape[1:]).index_add_(0, sequences, values)
