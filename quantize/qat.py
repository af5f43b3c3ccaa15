"""Quantization-aware training: weights and inputs are rounded in every forward pass as the deployed engine will round them.

ModelOpt's quantizers do the rounding, and let gradients through as if there were none. The base model's linears are rounded, the
heads stay in 16 bit. With ``ReferenceArguments.distill`` the base is held to the predictions of the unquantized model (QAD).

Scales of inputs are calibrated once, before the training. Those of weights follow the weights, by the rule of whoever stores them
in the end: ModelOpt would keep the maxima of the first step, and a scale that is not the deployed one makes another grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from medusa_export.core.errors import ConfigError
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.training.dataset import Example
from medusa_export.heads.training.full.arguments import LAYOUTS, ReferenceArguments
from medusa_export.heads.training.full.run import ReferenceReport, train_reference
from medusa_export.quantize.format_facts import QAT_TARGETS, NotOffered, Reach, Rounding
from medusa_export.quantize.formats import FORMATS, Format, get_format, get_kv_cache
from medusa_export.quantize.ptq import HEADS, import_quantization, insert_quantizers, read_scales, recipe
from medusa_export.quantize.qat_flags import QatFlags
from medusa_export.quantize.scales import SCALES_FILE

CALIBRATION_EXAMPLES = 64


_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class QatArguments(QatFlags):
    """The flags, and what follows from them."""

    def check(self) -> tuple[Format, Rounding]:
        """The format and its rounding, or ConfigError where there is nothing that could be trained."""
        weight_format = get_format(self.quant, self.group_size)
        if isinstance(weight_format.qat, NotOffered):
            trained = [name for name, row in FORMATS.items() if not isinstance(row.qat, NotOffered)]
            where, expected = f"quantization-aware training with {weight_format.name}", f"one of {', '.join(trained)}"
            raise ConfigError(where, weight_format.qat.why, expected, weight_format.qat.action)
        if get_kv_cache(self.kv_cache).needs_calibration:
            raise ConfigError(
                "quantization-aware training", f"kv cache {self.kv_cache}", "none", "quantize the cache when exporting"
            )
        if self.target not in QAT_TARGETS:
            raise ConfigError("target", self.target, f"one of {', '.join(QAT_TARGETS)}", "correct it")
        return weight_format, weight_format.qat[self.target]


def train_qat(
    model_dir: Path,
    dataset: Sequence[Example],
    output: Path,
    arguments: ReferenceArguments,
    quantization: QatArguments,
    *,
    batches: Sequence[Sequence[int]] = (),
    **options: Any,
) -> ReferenceReport:
    """Train heads for a quantized base, or heads and base; written as ``train_reference`` writes it, in 16 bit.

    The output has ``scales.safetensors`` too where the format calibrates: ``medusa-export --scales`` takes the same roundings.

    Args:
        batches: token ids to calibrate the inputs with, one sequence each; none: the first examples.
        options: further arguments of :func:`~medusa_export.heads.training.full.run.train_reference`.

    Returns:
        metrics are those of the quantized model.

    Raises:
        ConfigError: a format that cannot be trained, or that does not fit the model.
        MedusaExportError: as for ``train_reference``.
    """
    weight_format, rounding = quantization.check()
    if LAYOUTS[arguments.layout].holds_base:
        raise ConfigError(
            "layout", arguments.layout, "v1 or v2: its checkpoint would hold the quantizers", "use layout v2"
        )
    if arguments.uses_adapters and weight_format.smooths:  # ModelOpt cannot smooth weights under adapters
        expected = f"0 with {weight_format.name}, which moves factors into the weights"
        raise ConfigError("lora_rank", str(arguments.lora_rank), expected, "train all weights, or another format")
    texts = batches or [example.input_ids for example in dataset[:CALIBRATION_EXAMPLES]]
    extension = Quantizers(weight_format, rounding, texts, model_dir, trains_base=arguments.trains_base)
    return train_reference(model_dir, dataset, output, arguments, extension=extension, **options)


@dataclass
class Quantizers:
    """The extension of the reference training that puts ModelOpt's quantizers in and takes trained scales out."""

    weight_format: Format
    rounding: Rounding
    batches: Sequence[Sequence[int]] = field(repr=False)
    model_dir: Path
    trains_base: bool

    def recorded(self) -> dict[str, Any]:
        """JSON of what is rounded how."""
        return {"format": self.weight_format.name, "group_size": self.weight_format.group_size, "reach": self.rounding.reach.value,
                "span": self.rounding.span, "batches": [list(tokens) for tokens in self.batches]}  # fmt: skip

    def prepare(self, model: Any) -> None:
        """Insert and calibrate quantizers; from now on every pass of the decoder rounds by its current weights.

        Raises:
            ConfigError: a group size that does not divide the inputs.
        """
        insert_quantizers(model, self._config(model), self.weight_format, self.batches)
        self.refresh(model)
        if self.trains_base:
            model.model.register_forward_pre_hook(lambda *_: self.refresh(model))

    def refresh(self, model: Any) -> None:
        """Take the scales of all weights from the weights."""
        for fused in _fused_linears(model, self.weight_format):
            weights = {name: effective_weight(linear) for name, linear in fused.items()}
            largest = max(float(weight.abs().amax()) for weight in weights.values())
            for name, linear in fused.items():
                for quantizer, reach in zip(
                    weight_quantizers(linear), (self.rounding.reach, Reach.TENSOR), strict=False
                ):
                    _set_amax(quantizer, weights[name], reach, largest, self.rounding.span)

    def finish(self, model: Any, out: Path) -> None:
        """Give back weights as they are stored, without smoothing, and write the scales that belong to them."""
        dtype = getattr(torch, DecoderConfig.from_dir(self.model_dir).dtype)
        linears = dict(quantized_linears(model))
        smoothing = {name: linear.input_quantizer.pre_quant_scale for name, linear in linears.items()}
        with torch.no_grad():
            for name, linear in linears.items():
                factor = 1.0 if smoothing[name] is None else smoothing[name].reshape(1, -1)
                stored = (linear.weight * factor).to(dtype).float()  # what the exporter will read,
                linear.weight.copy_(stored / factor)  # and smooth again
            self.refresh(model)
            if self.weight_format.needs_calibration:
                read_scales(model, self.weight_format).save(out / SCALES_FILE)
            for name, linear in linears.items():
                if smoothing[name] is not None:
                    linear.weight.mul_(smoothing[name].reshape(1, -1))

    def _config(self, model: Any) -> dict[str, Any]:
        """ModelOpt's recipe for the base model's linears; later rules win."""
        rules, algorithm = recipe(import_quantization(), self.rounding.modelopt_config, self.weight_format)
        rules += [
            {"quantizer_name": pattern, "enable": False} for pattern in (f"*{HEADS}*", "*.lora_*", "*.base_layer.*")
        ]
        sizes = {name: linear.in_features for name, linear in _named_projections(model)}
        if self.rounding.bits is not None:
            for name, width in sizes.items():
                by_row = self.rounding.reach is Reach.ROW
                shape = {"axis": 0} if by_row else {"block_sizes": self._blocks(name, width)}
                cfg = {"num_bits": self.rounding.bits, **shape}
                rules.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": cfg})
        elif self.rounding.reach is Reach.GROUP:
            for name, width in sizes.items():
                self._blocks(name, width)
        return {"quant_cfg": rules, "algorithm": algorithm}

    def _blocks(self, name: str, width: int) -> dict[Any, Any]:
        """ModelOpt pads where a size does not divide the inputs; no engine does."""
        sizes = self.rounding.blocks or (self.weight_format.group_size or 1,)
        size = next((size for size in sizes if width % size == 0), None)
        if size is None:
            expected = f"a multiple of {' or '.join(map(str, sizes))}"
            raise ConfigError(name, f"{width} input features", expected, "choose another group size or format")
        return {-1: size, "type": "static"}


def effective_weight(linear: Any) -> torch.Tensor:
    """The weight that is rounded: with its adapters' product, where it has adapters.  # [out, in]"""
    base = getattr(linear, "base_layer", linear)
    weight: torch.Tensor = base.weight.detach()
    for name in getattr(linear, "active_adapters", ()) if base is not linear else ():
        product = (linear.scaling[name] * linear.lora_B[name].weight.detach()) @ linear.lora_A[name].weight.detach()
        weight = weight + product.to(weight.dtype)
    return weight


def _named_projections(model: Any) -> Iterator[tuple[str, Any]]:
    """Every linear of the decoder's layers by its name, one with adapters as a whole."""
    layers = model.model.layers
    for name, module in layers.named_modules():
        if hasattr(module, "in_features") and name.endswith("_proj"):
            yield f"model.layers.{name}", module


def quantized_linears(model: Any) -> Iterator[tuple[str, Any]]:
    """The same, where their weights are rounded."""
    for name, module in _named_projections(model):
        if any(stage.is_enabled for stage in weight_quantizers(module)):
            yield name, module


def weight_quantizers(linear: Any) -> list[Any]:
    """Quantizers that a weight goes through, one after the other."""
    quantizer = linear.weight_quantizer
    return list(quantizer) if isinstance(quantizer, torch.nn.Sequential) else [quantizer]


def _fused_linears(model: Any, weight_format: Format) -> Iterator[dict[str, Any]]:
    """Linears that share what a scale a tensor is: q, k and v, and without smoothing gate and up; see ``exporter.plan``."""
    waiting = dict(quantized_linears(model))
    groups = _FUSED[:1] if weight_format.smooths else _FUSED
    while waiting:
        name = next(iter(waiting))
        parent, _, last = name.rpartition(".")
        together = next((group for group in groups if last in group), (last,))
        yield {f"{parent}.{each}": waiting.pop(f"{parent}.{each}") for each in together}


def _set_amax(quantizer: Any, weight: torch.Tensor, reach: Reach, largest: float, span: float) -> None:
    amax = quantizer._amax
    if reach is Reach.TENSOR:
        amax.fill_(largest)
    else:
        grouped = weight.reshape(amax.numel(), -1)  # a row of it has one scale
        amax.copy_(grouped.abs().amax(dim=1).mul(span).reshape(amax.shape))
