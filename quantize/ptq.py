"""Post-training calibration with ModelOpt. It yields scales; the writers apply them while they stream the weights."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from medusa_export.core.errors import CheckpointError, ConfigError, InternalError, missing_package
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint, load_reference
from medusa_export.quantize.formats import Format, KvCache, check_heads, get_kv_cache
from medusa_export.quantize.scales import Scales

logger = logging.getLogger(__name__)

HEADS = "medusa_heads"
Progress = Callable[[int, int], None]


def calibrate(
    model_dir: Path,
    checkpoint: MedusaCheckpoint,
    weight_format: Format,
    *,
    kv_cache: str,
    quant_heads: bool,
    batches: Sequence[Sequence[int]],
    progress: Progress | None = None,
    device: str = "cpu",
) -> Scales:
    """Run prompts through the model and read the largest magnitude that every quantizer saw.

    Args:
        model_dir: the Hugging Face base model.
        checkpoint: the same model with its heads; read only when ``quant_heads``.
        weight_format: weight format; a format without calibration contributes no scales.
        kv_cache: key/value cache format.
        quant_heads: also the heads' linears and vocabulary projections.
        batches: token ids, one prompt each; they run one at a time, so nothing is padded.
        progress: called with (prompts done, prompts in all).
        device: where the model runs: float32 on "cpu", the checkpoint's dtype elsewhere.

    Raises:
        ConfigError: no prompts, nothing to calibrate, or heads that this format cannot quantize.
        CheckpointError: a scale that is zero or not finite (untrained heads, broken weights).
        MissingPackageError: ModelOpt is not installed.
    """
    kv = get_kv_cache(kv_cache)
    check_heads(weight_format, quant_heads)
    if not weight_format.needs_calibration and not kv.needs_calibration:
        raise ConfigError(
            f"format {weight_format.name}", "nothing to calibrate", "a format with scales", "skip calibration"
        )
    if not any(batches):
        raise ConfigError("calibration prompts", "none", "at least one prompt with tokens", "give a prompts file")
    with _modelopt_output_to_log():
        config = quant_config(import_quantization(), weight_format, kv, quant_heads)
        model = _load(model_dir, checkpoint, quant_heads, device)
    insert_quantizers(model, config, weight_format, batches, progress)
    return read_scales(model, weight_format)


def insert_quantizers(
    model: Any,
    config: dict[str, Any],
    weight_format: Format,
    batches: Sequence[Sequence[int]],
    progress: Progress | None = None,
) -> None:
    """Put ModelOpt's quantizers into a model, in place, and calibrate them.

    Args:
        model: a causal LM, perhaps in Medusa form.
        config: ModelOpt's recipe.
        weight_format: the format that it is for.
        batches: as for :func:`calibrate`.
        progress: likewise.

    Raises:
        CheckpointError: weights or activations that are not finite.
    """
    console = sys.stdout
    with _modelopt_output_to_log():
        try:
            import_quantization().quantize(model, config, forward_loop=forward_loop(batches, progress, console))
        except AssertionError as error:  # how ModelOpt reports values that are not finite
            raise CheckpointError(
                str(model.config.name_or_path),
                f"numbers that cannot be calibrated ({error})",
                "finite weights",
                "check it for NaN",
            ) from error
        if weight_format.smooths:
            share_smoothing(model, weight_format)


def import_quantization() -> Any:
    """ModelOpt's quantization package, or MissingPackageError."""
    try:
        import modelopt.torch.quantization
    except ImportError as error:
        raise missing_package("nvidia-modelopt", "modelopt") from error
    return modelopt.torch.quantization


def _load(model_dir: Path, checkpoint: MedusaCheckpoint, with_heads: bool, device: str) -> torch.nn.Module:
    """The base model, carrying the checkpoint's heads when they are to be quantized."""
    dtype = torch.float32 if device == "cpu" else getattr(torch, checkpoint.config.dtype)
    model = load_reference(model_dir, dtype, device)
    if with_heads:
        attach_heads(model, checkpoint)
    return model


def attach_heads(model: torch.nn.Module, checkpoint: MedusaCheckpoint) -> None:
    """Turn the model into ModelOpt's Medusa form and fill its (randomly made) heads, one tensor at a time."""
    import modelopt.torch.speculative as mtsp

    counts = {
        "medusa_num_heads": checkpoint.num_medusa_heads,
        "medusa_num_layers": checkpoint.num_medusa_layers,
    }
    mtsp.convert(model, [("medusa", counts)])
    with torch.no_grad():
        for name, parameter in model.get_submodule(HEADS).named_parameters():
            parameter.copy_(checkpoint.read(f"{HEADS}.{name}"))


def quant_config(quantization: Any, weight_format: Format, kv: KvCache, quant_heads: bool) -> dict[str, Any]:
    """ModelOpt's recipe: a list of rules in which later ones win, so exceptions are appended.

    Args:
        quantization: the module ``modelopt.torch.quantization``.
        weight_format: of the linears.
        kv: of the key/value cache.
        quant_heads: whether the heads' linears are quantized too.
    """
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    algorithm: Any = "max"
    if weight_format.modelopt_config is not None:
        rules, algorithm = recipe(quantization, weight_format.modelopt_config, weight_format)
    if kv.bits is not None:
        rules.append({"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": kv.bits, "axis": None}})
    if not quant_heads:
        rules.append({"quantizer_name": f"*{HEADS}*", "enable": False})
    return {"quant_cfg": rules, "algorithm": algorithm}


def recipe(quantization: Any, name: str, weight_format: Format) -> tuple[list[dict[str, Any]], Any]:
    """Rules and algorithm of one of ModelOpt's recipes, with the format's size of groups and smoothing.

    Args:
        quantization: ModelOpt's package.
        name: of the recipe in it.
        weight_format: the format that it is for.
    """
    found = copy.deepcopy(getattr(quantization, name))
    rules = list(found["quant_cfg"])
    for rule in rules:
        _set_group_size(rule, weight_format.group_size)
    if weight_format.smoothing_alpha is not None:
        return rules, {"method": "smoothquant", "alpha": weight_format.smoothing_alpha}
    return rules, found["algorithm"]


def _set_group_size(rule: dict[str, Any], group_size: int | None) -> None:
    stages = rule.get("cfg") or []
    for stage in stages if isinstance(stages, list) else [stages]:
        if group_size is not None and "block_sizes" in stage:
            stage["block_sizes"][-1] = group_size


def share_smoothing(model: torch.nn.Module, weight_format: Format) -> None:
    """q, k and v are one linear in TensorRT-LLM: they get one factor a channel, the mean of theirs, as in ModelOpt's exporter.

    SmoothQuant's gate and up get one too: it then goes into the norm before them.
    """
    from modelopt.torch.export.quant_utils import preprocess_linear_fusion

    groups = [[f"self_attn.{name}_proj" for name in "qkv"]]
    if weight_format.smoothing_alpha is not None:
        groups.append(["mlp.gate_proj", "mlp.up_proj"])
    for layer in model.get_submodule("model.layers").children():
        for names in groups:
            preprocess_linear_fusion([layer.get_submodule(name) for name in names])


def forward_loop(
    batches: Sequence[Sequence[int]], progress: Progress | None, console: TextIO
) -> Callable[[torch.nn.Module], None]:
    """The decoder and, where the model has them, the heads; the base lm_head is never quantized, so it is not run.

    Args:
        batches: token ids, one sequence each.
        progress: called with (done, total) sequences.
        console: the user's stdout; ModelOpt's own lines are kept from it.
    """

    def run(model: Any) -> None:
        device = next(model.parameters()).device
        for done, tokens in enumerate(batches, start=1):
            ids = torch.tensor([list(tokens)], dtype=torch.long, device=device)  # [1, S]
            with torch.no_grad():
                hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # [1, S, D]
                for head in getattr(model, HEADS, ()):
                    head(hidden)
            if progress is not None:
                with contextlib.redirect_stdout(console):  # only ModelOpt's own lines are kept from the user
                    progress(done, len(batches))

    return run


def read_scales(model: torch.nn.Module, weight_format: Format) -> Scales:
    """What the enabled quantizers saw, by the name of the module that they sit in."""
    scales = Scales()
    for name, module in model.named_modules():
        owner, _, kind = name.rpartition(".")
        if not getattr(module, "is_enabled", False) and not weight_format.smooths:
            continue
        if kind == "input_quantizer" and weight_format.input_bound and module.is_enabled:
            scales.input_amax[owner] = _amax(name, module)
        if kind == "input_quantizer" and module.pre_quant_scale is not None:
            scales.pre_quant_scale[owner] = module.pre_quant_scale.detach().float().cpu().reshape(-1)
        if kind == "weight_quantizer" and weight_format.stores_weight_amax and _enabled(module):
            scales.weight_amax[owner] = _amax(name, module[-1] if isinstance(module, torch.nn.Sequential) else module)
        if kind in ("k_bmm_quantizer", "v_bmm_quantizer") and module.is_enabled:
            layer = int(owner.split(".")[2])  # model.layers.{layer}.self_attn
            scales.kv_amax[layer] = max(scales.kv_amax.get(layer, 0.0), _amax(name, module))
    return dataclasses.replace(scales)  # which checks the values


def _enabled(quantizer: Any) -> bool:
    """A weight has one quantizer, or a sequence of them (INT4, then FP8)."""
    last = quantizer[-1] if isinstance(quantizer, torch.nn.Sequential) else quantizer
    return bool(last.is_enabled)


def _amax(name: str, quantizer: Any) -> float:
    amax = quantizer.amax
    if amax is None or amax.numel() != 1:
        got = "no amax" if amax is None else f"{amax.numel()} values"
        raise InternalError(f"ModelOpt quantizer {name}", got, "one value a tensor")
    return float(amax)


@contextlib.contextmanager
def _modelopt_output_to_log() -> Iterator[None]:
    """ModelOpt prints its progress notes; a command's stdout is for its result."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            logger.debug("modelopt: %s", line)
