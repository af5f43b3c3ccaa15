"""How far a written checkpoint's predictions are from those of the model that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from medusa_export.exporter.verify.dequantize import rounded_inputs
from medusa_export.exporter.verify.rebuild import InputForm, input_forms, rebuild_hf
from medusa_export.exporter.verify.trtllm_loader.config import read_config
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint, load_reference


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


def logits_agree(
    trt_dir: Path, model_dir: Path, checkpoint: MedusaCheckpoint, prompts: Sequence[Sequence[int]]
) -> list[str]:
    """Problems of a checkpoint's predictions, base and heads, against the source; in float32, all weights in memory.

    Inputs of quantized linears are rounded with the file's activation scales, as the engine does.

    Args:
        prompts: token ids; every position of every prompt is compared.
    """
    algo = read_config(trt_dir)["quantization"]["quant_algo"]
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
