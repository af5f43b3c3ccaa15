"""The one table of weight and key/value-cache formats that help texts, checks, writers and tests are derived from.

Sources: the quant_algo strings and their constraints are TensorRT-LLM's (``quantization/mode.py`` and ``layers``); the
names of the calibration recipes are those of ``modelopt.torch.quantization`` 0.47.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from medusa_export.heads.errors import ConfigError

MIN_SM = 80  # TensorRT-LLM's support matrix for Medusa
FP8_KV_CONFIG = "FP8_KV_CFG"


@dataclass(frozen=True)
class Format:
    """How the weights of the linears are stored and what that asks of the tools around.

    Attributes:
        name: what the user types.
        description: one line for --help.
        quant_algo: ``quantization.quant_algo`` of a TensorRT-LLM checkpoint; None is 16 bit.
        modelopt_config: attribute of ``modelopt.torch.quantization``; None where nothing is calibrated.
        needs_calibration: whether prompts have to be run through the model.
        trtllm_weights: the weights in the file: "fp8", or "float" for 16 bit (also where trtllm-build quantizes).
        onnx: "float", "fp8" or "int8"; None where the ONNX exporter has no form for it.
        quantizes_heads: whether the Medusa heads can be quantized along with the base.
        min_sm, max_sm: GPUs that the engine runs on, as 10 * major + minor; max_sm None is no known bound.
        group_size: input channels that share a scale; None where scales are per tensor or per channel.
        multiple: what in and out features must be a multiple of, on every tensor-parallel rank.
        exportable: whether this version writes it.
        nearest: the exportable format to name in the error when this one is not.
    """

    name: str
    description: str
    quant_algo: str | None = None
    modelopt_config: str | None = None
    needs_calibration: bool = False
    trtllm_weights: str = "float"
    onnx: str | None = None
    quantizes_heads: bool = False
    min_sm: int = MIN_SM
    max_sm: int | None = None
    group_size: int | None = None
    multiple: int = 1
    exportable: bool = False
    nearest: str = ""


# The builder refuses integer formats, SmoothQuant and per-channel FP8 on SM 100 .. 119; newer ones were not tried.
LAST_INTEGER_SM = 99

FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format("none", "16-bit weights, the parity reference", onnx="float", exportable=True, nearest="none"),
        Format(
            "fp8", "FP8 weights and activations, one scale a tensor (Ada, Hopper, Blackwell)", "FP8", "FP8_DEFAULT_CFG",
            needs_calibration=True, trtllm_weights="fp8", onnx="fp8", quantizes_heads=True, min_sm=89,
            exportable=True, nearest="fp8",
        ),
        Format(
            "fp8_rowwise", "FP8 with a scale a row and a token (Hopper)", "FP8_PER_CHANNEL_PER_TOKEN",
            "FP8_PER_CHANNEL_PER_TOKEN_CFG", min_sm=89, max_sm=LAST_INTEGER_SM, nearest="fp8",
        ),
        Format(
            "int8_sq", "INT8 weights and activations with SmoothQuant", "W8A8_SQ_PER_CHANNEL", "INT8_SMOOTHQUANT_CFG",
            needs_calibration=True, max_sm=LAST_INTEGER_SM, nearest="int8_wo",
        ),
        Format(
            "int8_wo", "INT8 weights, 16-bit activations; needs no prompts", "W8A16",
            onnx="int8", max_sm=LAST_INTEGER_SM, multiple=64, exportable=True, nearest="int8_wo",
        ),
        Format(
            "int4_wo", "INT4 weights, 16-bit activations; needs no prompts", "W4A16",
            max_sm=LAST_INTEGER_SM, multiple=64, nearest="int8_wo",
        ),
        Format(
            "int4_awq", "INT4 weights chosen by activation (AWQ), 16-bit activations", "W4A16_AWQ", "INT4_AWQ_CFG",
            needs_calibration=True, max_sm=LAST_INTEGER_SM, group_size=128, multiple=128, nearest="int8_wo",
        ),
        Format(
            "w4a8_awq", "INT4 AWQ weights, FP8 activations (Ada, Hopper)", "W4A8_AWQ", "W4A8_AWQ_BETA_CFG",
            needs_calibration=True, min_sm=89, max_sm=LAST_INTEGER_SM, group_size=128, multiple=128, nearest="fp8",
        ),
        Format(
            "nvfp4", "FP4 weights and activations in blocks of 16 (Blackwell)", "NVFP4", "NVFP4_DEFAULT_CFG",
            needs_calibration=True, min_sm=100, group_size=16, multiple=64, nearest="fp8",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class KvCache:
    """How keys and values are cached: the columns mean what they mean for :class:`Format`."""

    name: str
    description: str
    quant_algo: str | None = None
    modelopt_config: str | None = None
    min_sm: int = MIN_SM
    exportable: bool = False
    nearest: str = ""

    @property
    def needs_calibration(self) -> bool:
        """Whether the largest keys and values have to be measured."""
        return self.modelopt_config is not None


KV_CACHE: dict[str, KvCache] = {
    form.name: form
    for form in (
        KvCache("none", "16-bit keys and values", exportable=True, nearest="none"),
        KvCache(
            "fp8", "FP8 keys and values, half the memory", "FP8", FP8_KV_CONFIG, 89, exportable=True, nearest="fp8"
        ),
        KvCache("int8", "INT8 keys and values", "INT8", nearest="fp8"),
    )
}


def get_format(name: str) -> Format:
    """The weight format of that name.

    Raises:
        ConfigError: an unknown name, or one that this version cannot write (the nearest that it can is named).
    """
    return _get(FORMATS, name, "format")


def get_kv_cache(name: str) -> KvCache:
    """The key/value cache format of that name; errors as :func:`get_format`."""
    return _get(KV_CACHE, name, "kv cache format")


def check_heads(fmt: Format, quant_heads: bool) -> None:
    """Raise ConfigError when the Medusa heads are to be quantized in a format that cannot do it.

    TensorRT-LLM's build-time weight-only quantizer knows the base's linears only, and 16 bit has nothing to quantize.
    """
    if quant_heads and not fmt.quantizes_heads:
        able = ", ".join(form.name for form in FORMATS.values() if form.quantizes_heads)
        raise ConfigError(
            "quantized heads",
            f"format {fmt.name}",
            f"a format that quantizes heads ({able})",
            "leave the heads in 16 bit",
        )


def needs_calibration(fmt: Format, kv_cache: str) -> bool:
    """Whether the pair needs prompts: the weights' scales, the cache's, or both."""
    return fmt.needs_calibration or get_kv_cache(kv_cache).needs_calibration


_Row = TypeVar("_Row", "Format", "KvCache")


def _get(table: dict[str, _Row], name: str, what: str) -> _Row:
    able = ", ".join(form.name for form in table.values() if form.exportable)
    if name not in table:
        raise ConfigError(f"{what} {name!r}", "an unknown name", f"one of {able}", "check the spelling")
    form = table[name]
    if not form.exportable:
        raise ConfigError(
            f"{what} {name!r}",
            "a known format without a writer in this version",
            f"one of {able}",
            f"use {form.nearest}",
        )
    return form
