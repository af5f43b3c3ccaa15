"""``hf/``: ModelOpt's unified Hugging Face checkpoint, against the source and the recorded calibration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medusa_export.core.json_fields import read_json
from medusa_export.exporter.verify.dequantize import (
    FP4_ABSOLUTE,
    FP4_RELATIVE,
    FP4_VALUES,
    FP8_ABSOLUTE,
    FP8_RELATIVE,
    BoundedRows,
)
from medusa_export.exporter.verify.findings import Findings
from medusa_export.exporter.verify.numbers import SourceNumbers, value_problems, weight_differences
from medusa_export.exporter.verify.parts.source import Source
from medusa_export.exporter.verify.parts.tokenizers import tokenizer_problems
from medusa_export.exporter.verify.scales_file import FP4, FP8, TOLERANCE, ScalesFile
from medusa_export.heads.checkpoint.tensor_source import TensorSource

SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
OWN_KEYS = {"dtype", "torch_dtype", "medusa", "quantization_config"}  # of config.json, that the export sets
SCALES = (".weight_scale", ".weight_scale_2", ".input_scale", ".k_scale", ".v_scale")


@dataclass(frozen=True)
class UnifiedWeight:
    """A tensor of the directory under its Hugging Face name."""

    name: str
    shape: tuple[int, ...]
    file: TensorSource

    def row_numbers(self, start: int, stop: int) -> torch.Tensor | None:
        return None

    def rows(self, start: int, stop: int) -> BoundedRows:
        stored, module = self.file.read_rows(self.name, start, stop), self.name.removesuffix(".weight")
        if f"{module}.weight_scale" not in self.file:
            return BoundedRows(stored)
        scale = self.file.read(f"{module}.weight_scale").to(torch.float32)
        if stored.dtype == torch.uint8:
            codes = torch.stack([stored & 0xF, stored >> 4], dim=-1).flatten(-2)
            magnitude = FP4_VALUES[(codes & 7).to(torch.int64)]
            blocks = scale[start:stop] * float(self.file.read(f"{module}.weight_scale_2"))
            scale = blocks.repeat_interleave(codes.shape[1] // blocks.shape[1], dim=1)
            return BoundedRows(
                torch.where(codes >= 8, -magnitude, magnitude) * scale, FP4_RELATIVE, scale * FP4_ABSOLUTE
            )
        scale = scale if scale.dim() == 0 else scale.reshape(-1, 1)[start:stop]
        return BoundedRows(stored.to(torch.float32) * scale, FP8_RELATIVE, scale * FP8_ABSOLUTE)


def check_unified(
    path: Path,
    source: Source | None,
    scales: ScalesFile | None,
    algos: Mapping[str, str | None],
    findings: Findings,
    *,
    own_template: bool = False,
) -> None:
    """Say what is wrong with the directory.

    Args:
        algos: quant_algo and kv_cache_quant_algo that the manifest's arguments give.
        scales: the recorded calibration; None where the format needs none.
    """
    with findings.guarded("hf"):
        file, config = TensorSource.open(path), read_json(path / "config.json")
        findings.say("hf", _own_problems(path, file, config))
        findings.say("hf", _quantization_problems(path, file, config, algos))
        if scales is not None:
            findings.say("scales", (f"hf: {line}" for line in _scale_problems(file, config, scales)))
        if source is not None:
            findings.say("hf", _config_problems(config, source))
            findings.say("hf", _weight_problems(file, source))
        other = source.ckpt if source else None
        problems = tokenizer_problems(path, int(config["vocab_size"]), other, "the source's", own_template=own_template)
        findings.say("tokenizer", problems)


def _own_problems(path: Path, file: TensorSource, config: Mapping[str, Any]) -> Iterator[str]:
    """What the directory says against itself."""
    layers = {name.split(".")[2] for name in file.names if name.startswith("model.layers.")}
    heads = {name.split(".")[1] for name in file.names if name.startswith("medusa_heads.")}
    counts = {"num_hidden_layers": layers, "medusa.num_medusa_heads": heads}
    said = {
        "num_hidden_layers": config.get("num_hidden_layers"),
        **{f"medusa.{k}": v for k, v in (config.get("medusa") or {}).items()},
    }
    for key, found in counts.items():
        if said.get(key) != len(found):
            yield f"config.json: {key} is {said.get(key)}, and there are {len(found)}"
    yield from (
        f"{name}: {line}"
        for name in file.names
        if name.endswith(".weight")
        for line in value_problems(UnifiedWeight(name, _shape(file, name), file))
    )
    norm = "model.norm.weight"
    if norm in file and file.dtype(norm) != config.get("dtype"):
        yield f"config.json: dtype {config.get('dtype')}, but the tensors are {file.dtype(norm)}"


def _quantization_problems(
    path: Path, file: TensorSource, config: Mapping[str, Any], algos: Mapping[str, str | None]
) -> Iterator[str]:
    """The two places that say how it is quantized, the manifest, and the tensors."""
    quantization, beside = config.get("quantization_config"), path / "hf_quant_config.json"
    if (quantization is not None) != beside.is_file() or (quantization is None) != (not any(algos.values())):
        yield f"config.json says {'quantized' if quantization else '16 bit'}; hf_quant_config.json or the manifest do not"
    if quantization is None or not beside.is_file():
        return
    body = read_json(beside)
    other = body.get("quantization", {})
    pairs: list[tuple[str, Any, Any]] = [(key, other.get(key), value) for key, value in algos.items()]
    pairs += [
        (key, quantization.get(key), other.get(theirs))
        for key, theirs in (("quant_algo", "quant_algo"), ("ignore", "exclude_modules"))
    ]
    pairs += [
        ("producer", quantization.get("producer"), body.get("producer")),
        ("quant_method", quantization.get("quant_method"), "modelopt"),
    ]
    scheme = {"dynamic": False, "num_bits": 8, "type": "float"} if algos["kv_cache_quant_algo"] else None
    pairs.append(("kv_cache_scheme", quantization.get("kv_cache_scheme"), scheme))
    pairs.append(
        ("config_groups", quantization.get("config_groups"), _groups(algos["quant_algo"], other.get("group_size")))
    )
    yield from (
        f"hf_quant_config.json, config.json: {key} is {got!r}; expected {wanted!r}"
        for key, got, wanted in pairs
        if got != wanted
    )
    with_heads = "medusa_heads*" not in (quantization.get("ignore") or ())
    for name in file.names:
        if name.endswith("_proj.weight") or (
            with_heads and name.startswith("medusa_heads.") and name.endswith(".weight")
        ):
            module = name.removesuffix(".weight")
            for suffix in [
                *PARTS.get(algos["quant_algo"], LinearTensors()).beside,
                *_cache_parts(module, bool(scheme)),
            ]:
                if f"{module}.{suffix}" not in file:
                    yield f"{module}.{suffix} is missing"


@dataclass(frozen=True)
class LinearTensors:
    """How ModelOpt stores an algorithm's linears.

    Attributes:
        beside: tensors beside the weight.
        bits: ``num_bits`` in ``config_groups``; None: there are none.
        grouped: whether those say a group size, and fused linears share their weight scale.
        code: the largest, of scales a tensor.
    """

    beside: tuple[str, ...] = ()
    bits: int | None = None
    grouped: bool = False
    code: float = FP8


# By quant_algo.
PARTS: dict[str | None, LinearTensors] = {
    "FP8": LinearTensors(("weight_scale", "input_scale"), 8),
    "FP8_PER_CHANNEL_PER_TOKEN": LinearTensors(("weight_scale",)),
    "NVFP4": LinearTensors(("weight_scale", "weight_scale_2", "input_scale"), 4, grouped=True, code=FP4 * FP8),
}


def _cache_parts(module: str, quantized: bool) -> list[str]:
    return [f"{module[-6]}_scale"] if quantized and module.endswith(("k_proj", "v_proj")) else []


def _groups(algo: str | None, group_size: int | None) -> dict[str, Any] | None:
    """ModelOpt's description of a format that its loaders read."""
    parts = PARTS.get(algo, LinearTensors())
    if parts.bits is None:
        return None
    group = {"group_size": group_size} if parts.grouped else {}
    numbers = {"dynamic": False, "num_bits": parts.bits, "type": "float", **group}
    return {"group_0": {"input_activations": numbers, "weights": numbers, "targets": ["Linear"]}}


def _config_problems(config: Mapping[str, Any], source: Source) -> Iterator[str]:
    raw, checkpoint = source.checkpoint.config.raw, source.checkpoint
    for key in sorted((raw.keys() | config.keys()) - OWN_KEYS):
        if config.get(key) != raw.get(key):
            yield f"config.json: {key} is {config.get(key)!r}, the source has {raw.get(key)!r}"
    counts = {"num_medusa_heads": checkpoint.num_medusa_heads, "num_medusa_layers": checkpoint.num_medusa_layers}
    if config.get("medusa") != counts:
        yield f"config.json: medusa is {config.get('medusa')}, the source has {counts}"


def _weight_problems(file: TensorSource, source: Source) -> Iterator[str]:
    checkpoint = source.checkpoint
    tied = {"lm_head.weight"} if checkpoint.config.tie_word_embeddings else set()
    names = {name for name in file.names if not name.endswith(SCALES)}
    yield from (f"{name}: lost" for name in checkpoint.names if name not in names | tied)
    yield from (f"{name}: not in the source checkpoint" for name in sorted(names - set(checkpoint.names)))
    weights = [UnifiedWeight(name, _shape(file, name), file) for name in checkpoint.names if name in names]
    yield from weight_differences(weights, SourceNumbers(checkpoint), "the source's")


def _shape(file: TensorSource, name: str) -> tuple[int, ...]:
    shape = file.shape(name)
    return (shape[0], 2 * shape[1]) if file.dtype(name) == "uint8" else shape


def _scale_problems(file: TensorSource, config: Mapping[str, Any], scales: ScalesFile) -> Iterator[str]:
    parts = PARTS.get((config.get("quantization_config") or {}).get("quant_algo"), LinearTensors())
    for name in file.names:
        module, _, kind = name.rpartition(".")
        amax: float | None
        if kind == "input_scale":
            amax, least = scales.amax("input_amax", _sharing(module)), 0.0
        elif kind == "weight_scale_2" or (kind == "weight_scale" and file.shape(name) == ()):
            amax, least = scales.amax("weight_amax", _sharing(module) if parts.grouped else [module]), 0.0
        elif kind in ("k_scale", "v_scale"):
            amax, least = scales.amax("kv_amax", [module.split(".")[2]]), 1.0
        else:
            continue
        found = float(file.read(name).to(torch.float64).max())
        wanted = None if amax is None else max(amax / (FP8 if least else parts.code), least)
        if wanted is None or not abs(found - wanted) <= TOLERANCE * wanted:
            yield f"{name} is {found:.6g}; scales.safetensors gives {wanted if wanted is None else f'{wanted:.6g}'}"


def _sharing(module: str) -> list[str]:
    owner, _, last = module.rpartition(".")
    group = next((names for names in SHARED if last in names), (last,))
    return [f"{owner}.{name}" for name in group]
