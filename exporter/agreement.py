"""How far a written checkpoint is from the model that it was made from: weight by weight, and in its predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from medusa_export.exporter.rebuild import InputForm, Rebuilt, input_forms, iter_hf, rebuild_hf
from medusa_export.exporter.stored import rounded_inputs
from medusa_export.exporter.torch_threads import run_torch
from medusa_export.heads.config import read_json
from medusa_export.heads.model import MedusaCheckpoint, load_reference
from medusa_export.heads.threads import StopPoint

ROUNDING = 1.001  # slack for the float32 arithmetic of the comparison itself


@dataclass(frozen=True)
class Bound:
    """What predictions may lose in a format: mean KL in nats, and the share of positions with the same best token."""

    max_kl: float
    min_argmax: float


# By quant_algo; the weights of W8A16 and W4A16 are still 16 bit in the file. FP8's are loose enough for small models:
# SmolLM2-135M, over 4 Spec-Bench prompts, loses 0.084 nats and 15 % of best tokens, its heads up to 0.20 and 34 %.
BOUNDS: dict[str | None, Bound] = {
    **dict.fromkeys((None, "W8A16", "W4A16"), Bound(1e-3, 0.97)),
    **dict.fromkeys(("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "W8A8_SQ_PER_CHANNEL"), Bound(0.4, 0.5)),
    **dict.fromkeys(("W4A16_AWQ", "W4A8_AWQ"), Bound(0.8, 0.4)),
    "NVFP4": Bound(0.8, 0.3),  # four bits for activations too
}

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


@dataclass(frozen=True)
class WeightError:
    """What quantization did to one tensor.

    Attributes:
        largest: of the absolute differences, in units of the weight.
        snr_db: 10 log10 of the weights' energy over the differences'.
    """

    largest: float
    snr_db: float


def compare_weights(
    trt_dir: Path, checkpoint: MedusaCheckpoint, errors: dict[str, WeightError] | None = None
) -> list[str]:
    """Problems of a checkpoint's numbers: config values, names, and weights further off than its format rounds.

    A 16-bit weight has to be the source's, cast. A dequantized weight may be half a step off, element by element: this
    finds q, k and v in the wrong order, fc and gate swapped, heads swapped and wrong scales. Some rows are in memory at
    a time.

    Args:
        errors: filled with what quantization did to every quantized tensor.

    Raises:
        CheckpointError: files that cannot be put back together (ranks that disagree, padding that is not zero).
    """
    config = read_json(trt_dir / "config.json")
    problems = _config_differences(config, checkpoint)
    if problems:
        return problems
    items = {item.name: item for item in iter_hf(trt_dir)}
    problems = [f"{name}: not in the source checkpoint" for name in items if name not in set(checkpoint.names)]
    problems += [f"{name}: lost" for name in checkpoint.names if name not in items]
    both = [name for name in checkpoint.names if name in items]
    found = run_torch(lambda name, stop_point: _weight_difference(items[name], checkpoint, stop_point), both)
    for name, (problem, error) in zip(both, found, strict=True):
        problems += problem
        if errors is not None and items[name].is_quantized:
            errors[name] = error
    return problems


def logits_agree(
    trt_dir: Path, model_dir: Path, checkpoint: MedusaCheckpoint, prompts: Sequence[Sequence[int]]
) -> list[str]:
    """Problems of a checkpoint's predictions, base and heads, against the source; in float32, all weights in memory.

    Inputs of quantized linears are rounded with the file's activation scales, as the engine does.

    Args:
        prompts: token ids; every position of every prompt is compared.
    """
    algo = read_json(trt_dir / "config.json")["quantization"]["quant_algo"]
    forms, bound = input_forms(trt_dir), BOUNDS[algo]
    names = {name for name in checkpoint.names if name.startswith("medusa_heads.")}
    model: Any = load_reference(model_dir, torch.float32)
    heads = {name: checkpoint.read(name).to(torch.float32) for name in names}
    expected = [_predict(model, heads, checkpoint, ids, _rounding(None, {})) for ids in prompts]
    weights = {name: tensor.to(torch.float32) for name, tensor in rebuild_hf(trt_dir).items()}
    model.load_state_dict({name: tensor for name, tensor in weights.items() if name not in names})
    rounded = _rounding(algo, forms)
    with _rounded_inputs(model, forms, rounded):
        got = [_predict(model, weights, checkpoint, ids, rounded) for ids in prompts]
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


def _weight_difference(
    item: Rebuilt, checkpoint: MedusaCheckpoint, stop_point: StopPoint
) -> tuple[list[str], WeightError]:
    if item.shape != checkpoint.shape(item.name):
        shapes = f"shape {list(item.shape)}, the source has {list(checkpoint.shape(item.name))}"
        return [f"{item.name}: {shapes}"], WeightError(math.inf, -math.inf)
    wrong, noise, energy, largest = 0, 0.0, 0.0, 0.0
    for start, rows in item.chunks():
        stop_point()
        source = checkpoint.read_rows(item.name, start, start + len(rows.values))
        if rows.error is None and _same_bits(rows.values, source.to(rows.values.dtype)):
            continue
        expected = source.to(rows.values.dtype).to(torch.float32)
        error = rows.values.to(torch.float32).sub_(expected).abs_()
        allowed = torch.zeros(()) if rows.error is None else rows.error.mul_(ROUNDING)
        wrong += error.numel() - int(torch.le(error, allowed).sum())  # NaN compares false
        largest = max(largest, float(error.max()))
        noise, energy = (
            noise + float(torch.linalg.vecdot(error.flatten(), error.flatten())),
            energy + float(torch.linalg.vecdot(expected.flatten(), expected.flatten())),
        )
    snr_db = 10 * math.log10(max(energy, 1e-30) / max(noise, 1e-30))
    if not wrong:
        return [], WeightError(largest, snr_db)
    total, relative = math.prod(item.shape), math.sqrt(noise / max(energy, 1e-30))
    problem = f"{item.name}: {wrong} of {total} values are not the source's (relative error {relative:.3g})"
    return [problem], WeightError(largest, snr_db)


def _same_bits(values: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two contiguous tensors of 16 or 32 bits are equal bit by bit, compared eight bytes at a time."""
    left, right = (each.contiguous().reshape(-1) for each in (values, other))
    if left.nbytes % 8 == 0:
        left, right = left.view(torch.int64), right.view(torch.int64)
    return torch.equal(left, right)


def _predict(
    model: Any,
    heads: Mapping[str, torch.Tensor],
    checkpoint: MedusaCheckpoint,
    ids: Sequence[int],
    rounded: Callable[[str, torch.Tensor], torch.Tensor],
) -> list[torch.Tensor]:
    """Log-probabilities of the base and of every head.  # (1 + H) x [S, V]"""
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([list(ids)]), use_cache=False).last_hidden_state[0]  # [S, D]
        logits = [model.lm_head(hidden)]
        for head in range(checkpoint.num_medusa_heads):
            state = hidden
            for layer in range(checkpoint.num_medusa_layers):
                name = f"medusa_heads.{head}.{layer}.linear"
                block = functional.linear(rounded(name, state), heads[f"{name}.weight"], heads[f"{name}.bias"])
                state = state + functional.silu(block)
            name = f"medusa_heads.{head}.{checkpoint.num_medusa_layers}"
            logits.append(functional.linear(rounded(name, state), heads[f"{name}.weight"]))
    return [each.log_softmax(-1) for each in logits]


@contextmanager
def _rounded_inputs(
    model: Any, names: Iterable[str], rounded: Callable[[str, torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """The model with the inputs of its quantized linears rounded as the engine does."""
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: (rounded(name, args[0]),))
        for name in names
        if not name.startswith("medusa_heads.")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounding(algo: str | None, forms: Mapping[str, InputForm]) -> Callable[[str, torch.Tensor], torch.Tensor]:
    def rounded(name: str, x: torch.Tensor) -> torch.Tensor:
        form = forms.get(name)
        return x if form is None else rounded_inputs(algo, x, form.scale, form.smoothing)

    return rounded


def _logit_difference(what: str, expected: torch.Tensor, got: torch.Tensor, bound: Bound) -> list[str]:
    kl = float(functional.kl_div(got, expected, log_target=True, reduction="batchmean"))
    same = float((expected.argmax(-1) == got.argmax(-1)).float().mean())
    if kl <= bound.max_kl and same >= bound.min_argmax:
        return []
    limits = f"expected at most {bound.max_kl} and at least {bound.min_argmax:.0%}"
    return [f"{what}: mean KL {kl:.3g} nats, same best token at {same:.1%} of positions; {limits}"]
