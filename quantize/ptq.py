"""Post-training calibration with ModelOpt. It yields scales; the writers apply them while they stream the weights."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from medusa_export.heads.errors import ConfigError, missing_package
from medusa_export.heads.model import MedusaCheckpoint, load_reference
from medusa_export.quantize.formats import Format, KvCache, check_heads, get_kv_cache
from medusa_export.quantize.scales import Scales

logger = logging.getLogger(__name__)

HEADS = "medusa_heads"
Progress = Callable[[int, int], None]


def calibrate(
    model_dir: Path,
    checkpoint: MedusaCheckpoint,
    fmt: Format,
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
        fmt: weight format; a format without calibration contributes no scales.
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
    check_heads(fmt, quant_heads)
    if not fmt.needs_calibration and not kv.needs_calibration:
        raise ConfigError(f"format {fmt.name}", "nothing to calibrate", "a format with scales", "skip calibration")
    if not any(batches):
        raise ConfigError("calibration prompts", "none", "at least one prompt with tokens", "give a prompts file")
    console = sys.stdout
    with _modelopt_output_to_log():
        quantization = _import_quantization()
        model = _load(model_dir, checkpoint, quant_heads, device)
        config = _quant_config(quantization, fmt, kv, quant_heads)
        model = quantization.quantize(model, config, forward_loop=_forward_loop(batches, progress, console))
    return _read_scales(model)


def _import_quantization() -> Any:
    try:
        import modelopt.torch.quantization
    except ImportError as error:
        raise missing_package("nvidia-modelopt", "modelopt") from error
    return modelopt.torch.quantization


def _load(model_dir: Path, checkpoint: MedusaCheckpoint, with_heads: bool, device: str) -> torch.nn.Module:
    """The base model, carrying the checkpoint's heads when they are to be quantized."""
    dtype = torch.float32 if device == "cpu" else getattr(torch, checkpoint.config.dtype)
    model = load_reference(model_dir, dtype).to(device).eval()
    if with_heads:
        _attach_heads(model, checkpoint)
    return model


def _attach_heads(model: torch.nn.Module, checkpoint: MedusaCheckpoint) -> None:
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


def _quant_config(quantization: Any, fmt: Format, kv: KvCache, quant_heads: bool) -> dict[str, Any]:
    """ModelOpt's recipe: a list of rules in which later ones win, so exceptions are appended."""
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    algorithm: Any = "max"
    if fmt.needs_calibration and fmt.modelopt_config is not None:
        recipe = getattr(quantization, fmt.modelopt_config)
        rules, algorithm = list(recipe["quant_cfg"]), recipe["algorithm"]
    if kv.modelopt_config is not None:
        rules += getattr(quantization, kv.modelopt_config)["quant_cfg"]
    if not quant_heads:
        rules.append({"quantizer_name": f"*{HEADS}*", "enable": False})
    return {"quant_cfg": rules, "algorithm": algorithm}


def _forward_loop(
    batches: Sequence[Sequence[int]], progress: Progress | None, console: TextIO
) -> Callable[[torch.nn.Module], None]:
    """The decoder and, where the model has them, the heads; the base lm_head is never quantized, so it is not run."""

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


def _read_scales(model: torch.nn.Module) -> Scales:
    """The enabled quantizers' amax, by the name of the module that they sit in."""
    tables: dict[str, dict[str, float]] = {"input_quantizer": {}, "weight_quantizer": {}}
    kv_amax: dict[int, float] = {}
    for name, module in model.named_modules():
        owner, _, kind = name.rpartition(".")
        if not kind.endswith("_quantizer") or not getattr(module, "is_enabled", False):
            continue
        if kind in tables:
            tables[kind][owner] = _amax(name, module)
        elif kind in ("k_bmm_quantizer", "v_bmm_quantizer"):
            layer = int(owner.split(".")[2])  # model.layers.{layer}.self_attn
            kv_amax[layer] = max(kv_amax.get(layer, 0.0), _amax(name, module))
    return Scales(tables["input_quantizer"], tables["weight_quantizer"], kv_amax)


def _amax(name: str, quantizer: Any) -> float:
    amax = quantizer.amax
    if amax is None or amax.numel() != 1:
        got = "no amax" if amax is None else f"{amax.numel()} values"
        raise ConfigError(
            f"ModelOpt quantizer {name}", got, "one value a tensor", "use a per-tensor format such as fp8"
        )
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
