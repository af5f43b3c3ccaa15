"""The one table of weight and key/value-cache formats that help texts, checks, writers and tests are derived from.

Sources: the quant_algo strings and their constraints are TensorRT-LLM's (``quantization/mode.py`` and ``layers``); the
names of the calibration recipes are those of ``modelopt.torch.quantization`` 0.47.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from medusa_export.core.errors import ConfigError
from medusa_export.quantize.format_facts import (
    INT4_BLOCKS,
    INT8_BLOCKS,
    MIN_SM,
    QAT_TARGETS,
    Codes,
    HuggingFace,
    NotOffered,
    OnnxRuntime,
    Reach,
    Rounding,
    TensorRt,
    Trtllm,
)
from medusa_export.quantize.stored_parts import (
    Kind,
    Part,
    by_group,
    by_input,
    by_output,
    matrix,
    one,
    packed_columns,
    packed_rows,
    scalar,
)

FP8_MAX, INT8_MAX, INT4_MAX, FP4_MAX = 448.0, 127.0, 7.0, 6.0  # largest codes; float8_e4m3fn and float4_e2m1fn


@dataclass(frozen=True)
class Format:
    """A weight format: what its numbers are, and one object a target that says how the target takes it.

    Attributes:
        name: what the user types.
        description: one line for --help.
        trtllm: TensorRT-LLM, whose checkpoint every format has.
        tensorrt: TensorRT, or why not.
        qat: how quantization-aware training rounds for each of ``QAT_TARGETS``, or why there is none.
        onnxruntime: ONNX Runtime; None where it has no form.
        huggingface: ModelOpt's unified checkpoint; None where no writer makes it. Smoothed formats have none: in the unified form
            their factors move into the norms before, so that other tensors than the linears change.
        modelopt_config: attribute of ``modelopt.torch.quantization``; None where nothing is calibrated.
        weight_bound: the code that the largest weight of a scale's reach maps to.
        tensor_bound: the same of a scale a tensor, where the file has one.
        input_bound: the same for activations; None where they have no scale of their own in the file.
        smoothing_alpha: SmoothQuant's alpha, how much of an input's range moves into the weights: 1 all of it; None: no SmoothQuant.
        smooths: whether inputs are multiplied, and weights divided, by a calibrated factor a channel.
        quantizes_heads: whether the Medusa heads can be quantized along with the base.
        group_size: input channels that share a scale; None where scales are per tensor or per channel.
        group_sizes: what --group-size may choose; TensorRT-LLM has no kernels for others.
        nearest: the format to name in the error when a model does not fit this one.
    """

    name: str
    description: str
    trtllm: Trtllm
    tensorrt: TensorRt | NotOffered
    qat: Mapping[str, Rounding] | NotOffered = field(hash=False)
    onnxruntime: OnnxRuntime | None = None
    huggingface: HuggingFace | None = None
    modelopt_config: str | None = None
    weight_bound: float = 0.0
    tensor_bound: float = 0.0
    input_bound: float | None = None
    smoothing_alpha: float | None = None
    smooths: bool = False
    quantizes_heads: bool = False
    group_size: int | None = None
    group_sizes: tuple[int, ...] = ()
    nearest: str = "none"

    @property
    def needs_calibration(self) -> bool:
        """Whether prompts have to be run through the model."""
        return self.modelopt_config is not None

    @property
    def is_quantized(self) -> bool:
        """Whether the engine's weights are other than 16 bit."""
        return self.trtllm.algo is not None

    @property
    def stores_weight_amax(self) -> bool:
        """Whether the file has a scale a tensor, which fused linears share: it is taken from the calibration."""
        return any(part.kind is Kind.WEIGHT_SCALE for part in self.trtllm.parts)

    @property
    def calibration(self) -> list[Any]:
        """Everything of the row that a calibration depends on, as JSON."""
        numbers = [self.group_size, self.input_bound, self.smooths, self.stores_weight_amax]
        alpha = [] if self.smoothing_alpha is None else [self.smoothing_alpha]
        return [self.name, self.modelopt_config, *numbers, *alpha]


# The builder refuses integer formats, SmoothQuant and per-channel FP8 on SM 100 .. 119; newer ones were not tried.
LAST_INTEGER_SM = 99

_FP8_DTYPE = "float8_e4m3fn"
_INPUT_SCALE = Part("activation_scaling_factor", Kind.INPUT_SCALE, "float32", one)
_SMOOTHING = Part("prequant_scaling_factor", Kind.SMOOTHING, None, by_input)
_INT4_PARTS = (
    Part("weight", Kind.INT4, "int8", packed_rows),
    Part("weights_scaling_factor", Kind.GROUP_SCALE, "float32", by_group),
    _SMOOTHING,
)
_INT4_CONFIG = {"has_zero_point": False, "pre_quant_scale": True}

# ONNX Runtime. Blocks: MatMulNBits with 8-bit products; products of integers: such as do not saturate on processors before VNNI;
# others: fold DequantizeLinear into float32 weights once, when the session is made.
INT8_PRODUCTS = {"session.qdq_matmulnbits_accuracy_level": "4"}
EXACT_PRODUCTS = {"session.x64quantprecision": "1"}
FOLDED = {"session.disable_quant_qdq": "1"}
_ORT_FP8 = "the exported FP8 weights, float32 arithmetic"
_ORT_INT4_AWQ = OnnxRuntime(
    "int4_awq", "the exported INT4 weights, int8 arithmetic", Codes(4, Reach.GROUP, zero_points=True), INT8_PRODUCTS
)

FLOAT_CODES = Codes()  # of linears that stay as they are
_BY_ROW, _INT4_SMALL = Codes(8, Reach.ROW), Codes(4, Reach.GROUP, INT4_BLOCKS)
_FP8_GPUS: dict[str, Any] = {"min_sm": 89, "why": "FP8 begins with SM 89", "instead": "int8_sq"}


def _on_all_targets(rounding: Rounding) -> dict[str, Rounding]:
    return dict.fromkeys(QAT_TARGETS, rounding)


def _weight_only(modelopt_config: str, bits: int, blocks: tuple[int, ...]) -> dict[str, Rounding]:
    """Weight-only formats are rounded by trtllm-build, to amax / 8 and amax / 128 a row (TensorRT-LLM's
    symmetric_quantize_last_axis_of_batched_matrix), and in ONNX in the blocks of the exporter's MatMulNBits.
    """
    largest = 2 ** (bits - 1)
    by_row = Rounding(modelopt_config, Reach.ROW, span=(largest - 1) / largest, bits=bits)
    return {"trtllm": by_row, "onnx": Rounding(modelopt_config, Reach.GROUP, blocks, bits=bits)}


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format(
            "none",
            "16-bit weights, the parity reference",
            trtllm=Trtllm(excludable=False),
            onnxruntime=OnnxRuntime("float", "float32 arithmetic on 16/32-bit weights", FLOAT_CODES),
            tensorrt=TensorRt("float", "16-bit weights and products", FLOAT_CODES),
            huggingface=HuggingFace(),
            qat=NotOffered("a format that rounds nothing", "train without quantization"),
        ),
        Format(
            "fp8",
            "FP8 weights and activations, one scale a tensor (Ada, Hopper, Blackwell)",
            modelopt_config="FP8_DEFAULT_CFG",
            weight_bound=FP8_MAX,
            tensor_bound=FP8_MAX,
            input_bound=FP8_MAX,
            quantizes_heads=True,
            trtllm=Trtllm(
                "FP8",
                (
                    Part("weight", Kind.FP8, _FP8_DTYPE, matrix),
                    Part("weights_scaling_factor", Kind.WEIGHT_SCALE, "float32", one),
                    _INPUT_SCALE,
                ),
                min_sm=89,
                engine_bits=8,
                products="fp8",
            ),
            onnxruntime=OnnxRuntime("fp8", _ORT_FP8, Codes(8), FOLDED, activations=_FP8_DTYPE),
            tensorrt=TensorRt("fp8", "FP8 weights, activations and products", Codes(8), **_FP8_GPUS),
            huggingface=HuggingFace(
                (
                    Part("weight", Kind.FP8, _FP8_DTYPE, matrix),
                    Part("weight_scale", Kind.WEIGHT_SCALE, "float32", scalar),
                    Part("input_scale", Kind.INPUT_SCALE, "float32", scalar),
                ),
                group_bits=8,
            ),
            qat=_on_all_targets(Rounding("FP8_DEFAULT_CFG", Reach.TENSOR)),
        ),
        Format(
            "fp8_rowwise",
            "FP8 with a scale a row and a token (Hopper); needs no prompts",
            weight_bound=FP8_MAX,
            nearest="fp8",
            trtllm=Trtllm(
                "FP8_PER_CHANNEL_PER_TOKEN",
                (
                    Part("weight", Kind.FP8_ROW, _FP8_DTYPE, matrix),
                    Part("per_channel_scale", Kind.ROW_SCALE, "float32", by_output),
                ),
                min_sm=89,
                max_sm=LAST_INTEGER_SM,
                excludable=False,
                excludes=(
                    "*ln_f",
                    "*ln_embed",
                ),  # the default list's: TensorRT-LLM 0.17 and 0.18 would quantize the norms
                engine_bits=8,
                products="fp8",
            ),
            # no activations: TensorRT-LLM quantizes them a token, which is not in the exchange graph
            onnxruntime=OnnxRuntime("fp8_row", _ORT_FP8, _BY_ROW, FOLDED),
            tensorrt=TensorRt("fp8_row", "FP8 weights, 16-bit products", _BY_ROW, **_FP8_GPUS),
            huggingface=HuggingFace(
                (
                    Part("weight", Kind.FP8_ROW, _FP8_DTYPE, matrix),
                    Part("weight_scale", Kind.ROW_SCALE, "float32", by_output),
                )
            ),
            qat=_on_all_targets(Rounding("FP8_PER_CHANNEL_PER_TOKEN_CFG", Reach.ROW)),
        ),
        Format(
            "int8_sq",
            "INT8 weights and activations with SmoothQuant",
            modelopt_config="INT8_SMOOTHQUANT_CFG",
            weight_bound=INT8_MAX,
            input_bound=INT8_MAX,
            smoothing_alpha=0.75,  # measured, see docs/performance.md; ModelOpt's own is 1
            smooths=True,
            quantizes_heads=True,
            nearest="fp8",
            trtllm=Trtllm(
                "W8A8_SQ_PER_CHANNEL",
                (
                    Part("weight", Kind.INT8_ROW, "int8", matrix),
                    Part("weights_scaling_factor", Kind.ROW_SCALE, "float32", by_output),
                    _INPUT_SCALE,
                    _SMOOTHING,
                ),
                max_sm=LAST_INTEGER_SM,
                engine_bits=8,
                products="int8",
            ),
            onnxruntime=OnnxRuntime(
                "int8_row",
                "the exported INT8 weights and activations, products of integers",
                _BY_ROW,
                EXACT_PRODUCTS,
                activations="int8",
                integers=True,
            ),
            tensorrt=TensorRt("int8_sq", "INT8 weights, activations and products, smoothed", _BY_ROW),
            qat=_on_all_targets(Rounding("INT8_SMOOTHQUANT_CFG", Reach.ROW)),
        ),
        Format(
            "int8_wo",
            "INT8 weights, 16-bit activations; needs no prompts",
            nearest="fp8",
            trtllm=Trtllm("W8A16", build_bits=8, max_sm=LAST_INTEGER_SM, multiple=64, engine_bits=8),
            onnxruntime=OnnxRuntime(
                "int8",
                "int8 weights in blocks, int8 arithmetic",
                Codes(8, Reach.GROUP, INT8_BLOCKS, zero_points=True),
                INT8_PRODUCTS,
            ),
            tensorrt=TensorRt("int8", "INT8 weights, 16-bit products", _BY_ROW),
            qat=_weight_only("INT8_WEIGHT_ONLY_CFG", 8, INT8_BLOCKS),
        ),
        Format(
            "int4_wo",
            "INT4 weights, 16-bit activations; needs no prompts",
            nearest="fp8",
            trtllm=Trtllm("W4A16", build_bits=4, max_sm=LAST_INTEGER_SM, multiple=64, engine_bits=4),
            onnxruntime=OnnxRuntime(
                "int4",
                "int4 weights in blocks, int8 arithmetic",
                replace(_INT4_SMALL, zero_points=True),
                INT8_PRODUCTS,
            ),
            tensorrt=TensorRt("int4", "INT4 weights in blocks, 16-bit products", _INT4_SMALL),
            qat=_weight_only("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", 4, INT4_BLOCKS),
        ),
        Format(
            "int4_awq",
            "INT4 weights chosen by activation (AWQ), 16-bit activations",
            modelopt_config="INT4_AWQ_CFG",
            weight_bound=INT4_MAX,
            smooths=True,
            quantizes_heads=True,
            group_size=128,
            group_sizes=(64, 128),
            nearest="int8_wo",
            trtllm=Trtllm(
                "W4A16_AWQ",
                _INT4_PARTS,
                config=_INT4_CONFIG,
                max_sm=LAST_INTEGER_SM,
                multiple=64,
                fails_unmended=True,
                engine_bits=4,
            ),
            onnxruntime=_ORT_INT4_AWQ,
            tensorrt=TensorRt("int4_awq", "INT4 AWQ weights, 16-bit products", _INT4_SMALL),
            qat=_on_all_targets(Rounding("INT4_AWQ_CFG", Reach.GROUP)),
        ),
        Format(
            "w4a8_awq",
            "INT4 AWQ weights, FP8 activations (Ada, Hopper)",
            modelopt_config="W4A8_AWQ_BETA_CFG",
            weight_bound=INT4_MAX,
            tensor_bound=FP8_MAX,  # the second scale is of the first ones, in FP8
            input_bound=FP8_MAX,
            smooths=True,
            quantizes_heads=True,
            group_size=128,
            group_sizes=(128,),
            nearest="int4_awq",
            trtllm=Trtllm(
                "W4A8_AWQ",
                (*_INT4_PARTS, Part("weights_scaling_factor_2", Kind.WEIGHT_SCALE, "float32", one), _INPUT_SCALE),
                config=_INT4_CONFIG,
                min_sm=89,
                max_sm=LAST_INTEGER_SM,
                multiple=128,
                fails_unmended=True,
                engine_bits=4,
                products="fp8",
            ),
            onnxruntime=replace(_ORT_INT4_AWQ, activations=_FP8_DTYPE),
            tensorrt=NotOffered("TensorRT has no INT4 weights with FP8 activations", "take int4_awq"),
            qat=NotOffered("a format whose weights are rounded twice", "use int4_awq"),
        ),
        Format(
            "nvfp4",
            "FP4 weights and activations in blocks of 16 (Blackwell)",
            modelopt_config="NVFP4_DEFAULT_CFG",
            weight_bound=FP4_MAX * FP8_MAX,
            tensor_bound=FP4_MAX * FP8_MAX,
            input_bound=FP4_MAX * FP8_MAX,
            quantizes_heads=True,
            group_size=16,
            group_sizes=(16,),
            nearest="fp8",
            trtllm=Trtllm(
                "NVFP4",
                (
                    Part("weight", Kind.FP4, "uint8", packed_columns),
                    Part("weights_scaling_factor", Kind.BLOCK_SCALE, _FP8_DTYPE, by_group),
                    Part("weights_scaling_factor_2", Kind.WEIGHT_SCALE, "float32", one),
                    _INPUT_SCALE,
                ),
                min_sm=100,
                rank_tile=(128, 64),
                engine_bits=4,
                group_scale_bits=8,
                products="fp4",
            ),
            tensorrt=TensorRt(
                "nvfp4",
                "NVFP4 weights, activations and products",
                Codes(4, Reach.GROUP, scale_bytes=1),
                min_sm=100,
                why="FP4 begins with SM 100",
                instead="fp8",
            ),
            huggingface=HuggingFace(
                (
                    Part("weight", Kind.FP4, "uint8", packed_columns),
                    Part("weight_scale", Kind.BLOCK_SCALE, _FP8_DTYPE, by_group),
                    Part("weight_scale_2", Kind.WEIGHT_SCALE, "float32", scalar),
                    Part("input_scale", Kind.INPUT_SCALE, "float32", scalar),
                ),
                fuses_weight_scales=True,
                group_bits=4,
            ),
            qat=NotOffered("a format that ModelOpt rounds on GPUs only", "use fp8 or int4_awq"),
        ),
    )
}


@dataclass(frozen=True)
class KvCache:
    """How keys and values are cached.

    Attributes:
        quant_algo: ``quantization.kv_cache_quant_algo`` of a TensorRT-LLM checkpoint; None is 16 bit.
        bits: ``num_bits`` of ModelOpt's quantizers; None where nothing is calibrated.
        bound: the code that the largest key or value maps to.
        min_scale: scales below it are raised to it.
        min_sm, max_sm: as for formats.
        bytes: of one value on the GPU.
        in_huggingface: whether ModelOpt's unified checkpoint has a form for it.
    """

    name: str
    description: str
    quant_algo: str | None = None
    bits: int | tuple[int, int] | None = None
    bound: float = 0.0
    min_scale: float = 0.0
    min_sm: int = MIN_SM
    max_sm: int | None = None
    bytes: int = 1
    in_huggingface: bool = True

    @property
    def needs_calibration(self) -> bool:
        """Whether the largest keys and values have to be measured."""
        return self.bits is not None


KV_CACHE: dict[str, KvCache] = {
    row.name: row
    for row in (
        KvCache("none", "16-bit keys and values", bytes=2),
        # 1 is TensorRT-LLM's recommended scale; smaller ones cost accuracy where later tokens are larger.
        KvCache("fp8", "FP8 keys and values, half the memory", "FP8", (4, 3), FP8_MAX, min_scale=1.0, min_sm=89),
        KvCache(
            "int8",
            "INT8 keys and values, half the memory",
            "INT8",
            8,
            INT8_MAX,
            max_sm=LAST_INTEGER_SM,
            in_huggingface=False,
        ),
    )
}


def get_format(name: str, group_size: int | None = None) -> Format:
    """The weight format of that name, with another group size where one is given.

    Raises:
        ConfigError: an unknown name, or a group size that TensorRT-LLM has no kernel for.
    """
    weight_format = _get(FORMATS, name, "format")
    if group_size is None or group_size == weight_format.group_size:
        return weight_format
    if group_size not in weight_format.group_sizes:
        expected = (
            f"one of {', '.join(map(str, weight_format.group_sizes))}"
            if weight_format.group_sizes
            else "none: it has no groups"
        )
        raise ConfigError("--group-size", f"{group_size} for {name}", expected, "leave --group-size out")
    return replace(weight_format, group_size=group_size)


def group_sizes() -> str:
    """The choices of --group-size, for --help."""
    rows = (row for row in FORMATS.values() if len(row.group_sizes) > 1)
    return " ".join(
        f"for {row.name}: {' or '.join(map(str, row.group_sizes))} ({row.group_size} by default)." for row in rows
    )


def get_kv_cache(name: str) -> KvCache:
    """The key/value cache format of that name; errors as :func:`get_format`."""
    return _get(KV_CACHE, name, "kv cache format")


def check_heads(weight_format: Format, quant_heads: bool) -> None:
    """Raise ConfigError when the Medusa heads are to be quantized in a format that cannot do it.

    TensorRT-LLM's build-time weight-only quantizer knows the base's linears only, and 16 bit has nothing to quantize.
    """
    if quant_heads and not weight_format.quantizes_heads:
        able = ", ".join(row.name for row in FORMATS.values() if row.quantizes_heads)
        raise ConfigError(
            "quantized heads",
            f"format {weight_format.name}",
            f"a format that quantizes heads ({able})",
            "leave the heads in 16 bit",
        )


def needs_calibration(weight_format: Format, kv_cache: str) -> bool:
    """Whether the pair needs prompts: the weights' scales, the cache's, or both."""
    return weight_format.needs_calibration or get_kv_cache(kv_cache).needs_calibration


_Row = TypeVar("_Row", "Format", "KvCache")


def _get(table: dict[str, _Row], name: str, what: str) -> _Row:
    if name not in table:
        raise ConfigError(f"{what} {name!r}", "an unknown name", f"one of {', '.join(table)}", "check the spelling")
    return table[name]
