"""How far a written checkpoint is from the model that it was made from: weight by weight, and in its predictions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from medusa_export.exporter.rebuild import Rebuilt, activation_scales, iter_hf, rebuild_hf
from medusa_export.heads.checkpoint import row_chunks
from medusa_export.heads.config import read_json
from medusa_export.heads.model import MedusaCheckpoint, load_reference
from medusa_export.quantize.scales import dequantize_fp8, quantize_fp8

# float8_e4m3fn keeps 3 bits of mantissa: half a step is 1/16 of the value, or 2**-10 scales among the subnormals.
FP8_RELATIVE = 1 / 16
FP8_ABSOLUTE = 2.0**-10
ROUNDING = 1.001  # slack for the float32 arithmetic of the comparison itself


@dataclass(frozen=True)
class Bound:
    """What predictions may lose in a format: mean KL in nats, and the share of positions with the same best token."""

    max_kl: float
    min_argmax: float


# By quant_algo; the weights of W8A16 are still 16 bit in the file. FP8's are loose enough for small models:
# SmolLM2-135M, over 4 Spec-Bench prompts, loses 0.084 nats and 15 % of best tokens, its heads up to 0.20 and 34 %.
BOUNDS: dict[str | None, Bound] = {None: Bound(1e-3, 0.97), "W8A16": Bound(1e-3, 0.97), "FP8": Bound(0.4, 0.5)}

CONFIG_PAIRS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "hidden_act": "hidden_act",
    "norm_epsilon": "rms_norm_eps",
    "rotary_base": "rope_theta",
    "max_position_embeddings": "max_position_embeddings",
    "attn_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
}


def compare_weights(trt_dir: Path, checkpoint: MedusaCheckpoint) -> list[str]:
    """Problems of a checkpoint's numbers: config values, names, and weights further off than its format rounds.

    A 16-bit weight has to be the source's, cast. A dequantized FP8 weight may be half a step off, element by
    element: this finds q, k and v in the wrong order, fc and gate swapped, heads swapped and wrong scales. One tensor
    is in memory at a time.

    Raises:
        CheckpointError: files that cannot be put back together (ranks that disagree, padding that is not zero).
    """
    config = read_json(trt_dir / "config.json")
    problems = _config_differences(config, checkpoint)
    if problems:
        return problems
    missing = set(checkpoint.names)
    for item in iter_hf(trt_dir):
        if item.name not in missing:
            problems.append(f"{item.name}: not in the source checkpoint")
            continue
        missing.remove(item.name)
        problems += _weight_difference(item, checkpoint.read(item.name))
    return problems + [f"{name}: lost" for name in sorted(missing)]


def logits_agree(
    trt_dir: Path, model_dir: Path, checkpoint: MedusaCheckpoint, prompts: Sequence[Sequence[int]]
) -> list[str]:
    """Problems of a checkpoint's predictions, base and heads, against the source; in float32, all weights in memory.

    With FP8, inputs of quantized linears are rounded with the file's activation scales, as the engine does.

    Args:
        prompts: token ids; every position of every prompt is compared.
    """
    bound = BOUNDS[read_json(trt_dir / "config.json")["quantization"]["quant_algo"]]
    names = {name for name in checkpoint.names if name.startswith("medusa_heads.")}
    model: Any = load_reference(model_dir, torch.float32)
    heads = {name: checkpoint.read(name).to(torch.float32) for name in names}
    expected = [_predict(model, heads, checkpoint, ids, {}) for ids in prompts]
    weights = {name: tensor.to(torch.float32) for name, tensor in rebuild_hf(trt_dir).items()}
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name not in names})
    scales = activation_scales(trt_dir)
    with _rounded_inputs(model, scales):
        got = [_predict(model, weights, checkpoint, ids, scales) for ids in prompts]
    return [
        problem
        for row, what in enumerate(["base", *(f"head {head}" for head in range(checkpoint.num_medusa_heads))])
        for problem in _logit_difference(
            what, torch.cat([each[row] for each in expected]), torch.cat([each[row] for each in got]), bound
        )
    ]


def _config_differences(config: dict[str, Any], checkpoint: MedusaCheckpoint) -> list[str]:
    """Config values that the weights cannot show, but that change every prediction."""
    source = checkpoint.config
    pairs = {theirs: (config.get(theirs), getattr(source, ours)) for theirs, ours in CONFIG_PAIRS.items()}
    pairs["num_medusa_heads"] = (config.get("num_medusa_heads"), checkpoint.num_medusa_heads)
    pairs["num_medusa_layers"] = (config.get("num_medusa_layers"), checkpoint.num_medusa_layers)
    scaling = dict(config.get("rotary_scaling") or {})
    scaling.pop("type", None)
    pairs["rotary_scaling"] = (scaling, {key: x for key, x in (source.rope_scaling or {}).items() if key != "type"})
    return [
        f"config.json: {key} is {got!r}, the source has {expected!r}"
        for key, (got, expected) in pairs.items()
        if got != expected
    ]


def _weight_difference(item: Rebuilt, source: torch.Tensor) -> list[str]:
    if item.tensor.shape != source.shape:
        return [f"{item.name}: shape {list(item.tensor.shape)}, the source has {list(source.shape)}"]
    wrong, error_norm, norm = 0, 0.0, 0.0
    for got, part in zip(row_chunks(item.tensor), row_chunks(source), strict=True):
        if item.scale is None:
            expected, allowed = part.to(got.dtype).to(torch.float32), torch.zeros(())
        else:
            expected = part.to(torch.float32)
            allowed = ROUNDING * (expected.abs() * FP8_RELATIVE + item.scale * FP8_ABSOLUTE)
        error = (got.to(torch.float32) - expected).abs()
        wrong += int((error > allowed).sum())
        error_norm, norm = math.hypot(error_norm, float(error.norm())), math.hypot(norm, float(expected.norm()))
    if not wrong:
        return []
    relative = error_norm / max(norm, 1e-30)
    return [f"{item.name}: {wrong} of {source.numel()} values are not the source's (relative error {relative:.3g})"]


def _predict(
    model: Any,
    heads: Mapping[str, torch.Tensor],
    checkpoint: MedusaCheckpoint,
    ids: Sequence[int],
    scales: Mapping[str, float],
) -> list[torch.Tensor]:
    """Log-probabilities of the base and of every head.  # (1 + H) x [S, V]"""
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([list(ids)]), use_cache=False).last_hidden_state[0]  # [S, D]
        logits = [model.lm_head(hidden)]
        for head in range(checkpoint.num_medusa_heads):
            state = hidden
            for layer in range(checkpoint.num_medusa_layers):
                name = f"medusa_heads.{head}.{layer}.linear"
                block = functional.linear(
                    _round(state, scales.get(name)), heads[f"{name}.weight"], heads[f"{name}.bias"]
                )
                state = state + functional.silu(block)
            name = f"medusa_heads.{head}.{checkpoint.num_medusa_layers}"
            logits.append(functional.linear(_round(state, scales.get(name)), heads[f"{name}.weight"]))
    return [each.log_softmax(-1) for each in logits]


@contextmanager
def _rounded_inputs(model: Any, scales: Mapping[str, float]) -> Iterator[None]:
    """The model with the inputs of its quantized linears rounded to FP8."""
    handles = [
        module.register_forward_pre_hook(lambda _, args, scale=scales[name]: (_round(args[0], scale),))
        for name, module in model.named_modules()
        if name in scales
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _round(inputs: torch.Tensor, scale: float | None) -> torch.Tensor:
    """The inputs as an FP8 linear with that scale sees them; unchanged without one."""
    return inputs if scale is None else dequantize_fp8(quantize_fp8(inputs, scale), scale)


def _logit_difference(what: str, expected: torch.Tensor, got: torch.Tensor, bound: Bound) -> list[str]:
    kl = float(functional.kl_div(got, expected, log_target=True, reduction="batchmean"))
    same = float((expected.argmax(-1) == got.argmax(-1)).float().mean())
    if kl <= bound.max_kl and same >= bound.min_argmax:
        return []
    limits = f"expected at most {bound.max_kl} and at least {bound.min_argmax:.0%}"
    return [f"{what}: mean KL {kl:.3g} nats, same best token at {same:.1%} of positions; {limits}"]
