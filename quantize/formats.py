"""The one table of weight and key/value-cache formats that help texts, checks, writers and tests are derived from.

Sources: the quant_algo strings and their constraints are TensorRT-LLM's (``quantization/mode.py`` and ``layers``); the
names of the calibration recipes are those of ``modelopt.torch.quantization`` 0.47.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from medusa_export.core.errors import ConfigError

MIN_SM = 80  # TensorRT-LLM's support matrix for Medusa
FP8_MAX, INT8_MAX, INT4_MAX, FP4_MAX = 448.0, 127.0, 7.0, 6.0  # largest codes; float8_e4m3fn and float4_e2m1fn


@dataclass(frozen=True)
class Format:
    """How the weights of the linears are stored and what that asks of the tools around.

    Attributes:
        name: what the user types.
        description: one line for --help.
        quant_algo: ``quantization.quant_algo`` of a TensorRT-LLM checkpoint; None is 16 bit.
        storage: key of the exporter's table of tensors: "float" for 16 bit (also where trtllm-build quantizes).
        modelopt_config: attribute of ``modelopt.torch.quantization``; None where nothing is calibrated.
        weight_bound: the code that the largest weight of a scale's reach maps to.
        input_bound: the same for activations; None where they have no scale of their own in the file.
        smooths: whether inputs are multiplied, and weights divided, by a calibrated factor a channel.
        onnx: the ONNX exporter's form; None where it has none.
        quantizes_heads: whether the Medusa heads can be quantized along with the base.
        min_sm, max_sm: GPUs that the engine runs on, as 10 * major + minor; max_sm None is no known bound.
        group_size: input channels that share a scale; None where scales are per tensor or per channel.
        group_sizes: what --group-size may choose; TensorRT-LLM has no kernels for others.
        multiple: times the number of ranks, what in and out features must be a multiple of.
        rank_tile: what out and in features of each rank must be a multiple of.
        excludable: whether single linears can be left in 16 bit.
        nearest: the format to name in the error when a model does not fit this one.
    """

    name: str
    description: str
    quant_algo: str | None = None
    storage: str = "float"
    modelopt_config: str | None = None
    weight_bound: float = 0.0
    input_bound: float | None = None
    smooths: bool = False
    onnx: str | None = None
    quantizes_heads: bool = False
    min_sm: int = MIN_SM
    max_sm: int | None = None
    group_size: int | None = None
    group_sizes: tuple[int, ...] = ()
    multiple: int = 1
    rank_tile: tuple[int, int] = (1, 1)
    excludable: bool = True
    nearest: str = "none"

    @property
    def needs_calibration(self) -> bool:
        """Whether prompts have to be run through the model."""
        return self.modelopt_config is not None

    @property
    def tensor_bound(self) -> float:
        """The code of the largest weight of a tensor, where the file has a scale a tensor: INT4's second scale is FP8."""
        return FP8_MAX if self.storage == "int4_fp8" else self.weight_bound

    @property
    def stores_weight_amax(self) -> bool:
        """Whether the file has a scale a tensor, which fused linears share: it is taken from the calibration."""
        return self.input_bound is not None and self.storage != "int8_row"


# The builder refuses integer formats, SmoothQuant and per-channel FP8 on SM 100 .. 119; newer ones were not tried.
LAST_INTEGER_SM = 99

FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format("none", "16-bit weights, the parity reference", onnx="float", excludable=False),
        Format(
            "fp8", "FP8 weights and activations, one scale a tensor (Ada, Hopper, Blackwell)", "FP8", "fp8",
            "FP8_DEFAULT_CFG", FP8_MAX, FP8_MAX, onnx="fp8", quantizes_heads=True, min_sm=89,
        ),
        Format(
            "fp8_rowwise", "FP8 with a scale a row and a token (Hopper); needs no prompts",
            "FP8_PER_CHANNEL_PER_TOKEN", "fp8_row", weight_bound=FP8_MAX, onnx="fp8_row", min_sm=89,
            max_sm=LAST_INTEGER_SM, excludable=False, nearest="fp8",
        ),
        Format(
            "int8_sq", "INT8 weights and activations with SmoothQuant", "W8A8_SQ_PER_CHANNEL", "int8_row",
            "INT8_SMOOTHQUANT_CFG", INT8_MAX, INT8_MAX, smooths=True, onnx="int8_row", quantizes_heads=True,
            max_sm=LAST_INTEGER_SM, nearest="fp8",
        ),
        Format(
            "int8_wo", "INT8 weights, 16-bit activations; needs no prompts", "W8A16", onnx="int8",
            max_sm=LAST_INTEGER_SM, multiple=64, nearest="fp8",
        ),
        Format(
            "int4_wo", "INT4 weights, 16-bit activations; needs no prompts", "W4A16", onnx="int4",
            max_sm=LAST_INTEGER_SM, multiple=64, nearest="fp8",
        ),
        Format(
            "int4_awq", "INT4 weights chosen by activation (AWQ), 16-bit activations", "W4A16_AWQ", "int4",
            "INT4_AWQ_CFG", INT4_MAX, smooths=True, onnx="int4_awq", quantizes_heads=True, max_sm=LAST_INTEGER_SM,
            group_size=128, group_sizes=(64, 128), multiple=64, nearest="int8_wo",
        ),
        Format(
            "w4a8_awq", "INT4 AWQ weights, FP8 activations (Ada, Hopper)", "W4A8_AWQ", "int4_fp8",
            "W4A8_AWQ_BETA_CFG", INT4_MAX, FP8_MAX, smooths=True, onnx="int4_awq", quantizes_heads=True, min_sm=89,
            max_sm=LAST_INTEGER_SM, group_size=128, group_sizes=(128,), multiple=128, nearest="int4_awq",
        ),
        Format(
            "nvfp4", "FP4 weights and activations in blocks of 16 (Blackwell)", "NVFP4", "nvfp4",
            "NVFP4_DEFAULT_CFG", FP4_MAX * FP8_MAX, FP4_MAX * FP8_MAX, quantizes_heads=True, min_sm=100,
            group_size=16, group_sizes=(16,), rank_tile=(128, 64), nearest="fp8",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class KvCache:
    """How keys and values are cached: the columns mean what they mean for :class:`Format`.

    Attributes:
        bits: ``num_bits`` of ModelOpt's quantizers; None where nothing is calibrated.
        bound: the code that the largest key or value maps to.
        min_scale: scales below it are raised to it.
        max_sm: as for formats.
    """

    name: str
    description: str
    quant_algo: str | None = None
    bits: int | tuple[int, int] | None = None
    bound: float = 0.0
    min_scale: float = 0.0
    min_sm: int = MIN_SM
    max_sm: int | None = None

    @property
    def needs_calibration(self) -> bool:
        """Whether the largest keys and values have to be measured."""
        return self.bits is not None


KV_CACHE: dict[str, KvCache] = {
    form.name: form
    for form in (
        KvCache("none", "16-bit keys and values"),
        # 1 is TensorRT-LLM's recommended scale; smaller ones cost accuracy where later tokens are larger.
        KvCache("fp8", "FP8 keys and values, half the memory", "FP8", (4, 3), FP8_MAX, min_scale=1.0, min_sm=89),
        KvCache("int8", "INT8 keys and values, half the memory", "INT8", 8, INT8_MAX, max_sm=LAST_INTEGER_SM),
    )
}


def get_format(name: str, group_size: int | None = None) -> Format:
    """The weight format of that name, with another group size where one is given.

    Raises:
        ConfigError: an unknown name, or a group size that TensorRT-LLM has no kernel for.
    """
    form = _get(FORMATS, name, "format")
    if group_size is None or group_size == form.group_size:
        return form
    if group_size not in form.group_sizes:
        expected = f"one of {', '.join(map(str, form.group_sizes))}" if form.group_sizes else "none: it has no groups"
        raise ConfigError(f"group size of format {name}", str(group_size), expected, "leave --group-size out")
    return replace(form, group_size=group_size)


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
    if name not in table:
        raise ConfigError(f"{what} {name!r}", "an unknown name", f"one of {', '.join(table)}", "check the spelling")
    return table[name]
