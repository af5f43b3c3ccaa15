"""What a row of the format table says about each target: one class a target, all of them data.

The row is in ``formats.py``. Code that computes is beside the target and keyed by what stands here: see docs/adding.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from medusa_export.quantize.stored_parts import Part

MIN_SM = 80  # TensorRT-LLM's support matrix for Medusa
QAT_TARGETS = ("trtllm", "onnx")  # whose rounding a quantization-aware training takes
# Sizes of blocks along the inputs that ONNX Runtime's MatMulNBits takes, largest that divides wins. For 4 bits only small
# ones: TensorRT-LLM's own W4A16 has a scale a row, which loses far more.
INT8_BLOCKS, INT4_BLOCKS = (128, 64, 32, 16), (32, 16)


class Reach(Enum):
    """Which weights share a scale."""

    TENSOR = "tensor"  # with all that is fused
    ROW = "row"
    GROUP = "group"  # of inputs

    def count(self, rows: int, width: int, group: int) -> int:
        """Scales of a weight.  # [rows, width]

        Args:
            rows: outputs of the weight.
            width: inputs of the weight.
            group: inputs that share a scale.
        """
        return {Reach.TENSOR: 1, Reach.ROW: rows, Reach.GROUP: rows * width // group}[self]


@dataclass(frozen=True)
class NotOffered:
    """Why a target does not take a format, and what to do: both as in an error message."""

    why: str
    action: str


@dataclass(frozen=True)
class Trtllm:
    """How a format goes to TensorRT-LLM.

    Attributes:
        algo: ``quantization.quant_algo`` of the checkpoint; None is 16 bit.
        parts: what a quantized linear is stored in; empty where the file's weights are 16 bit, also where trtllm-build quantizes.
        build_bits: of weights that trtllm-build quantizes for its GPU; None where the engine takes them as they are in the file.
        config: further keys of ``quantization`` in config.json, besides the group size.
        min_sm, max_sm: GPUs that the engine runs on, as 10 * major + minor; max_sm None is no known bound.
        multiple: times the number of ranks, what in and out features must be a multiple of.
        rank_tile: what out and in features of each rank must be a multiple of.
        excludable: whether single linears can be left in 16 bit.
        excludes: patterns that ``exclude_modules`` needs besides those of every format.
        fails_unmended: whether trtllm-build fails on Medusa with it unless a class is mended, see engines/trtllm/awq_builder.py.
        engine_bits: of a weight in the engine, its group's scale left out.
        group_scale_bits: of that scale.
        products: what products are made in, a key of ``Gpu.operations`` in ``heads/roofline/gpus.py``.
    """

    algo: str | None = None
    parts: tuple[Part, ...] = ()
    build_bits: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    min_sm: int = MIN_SM
    max_sm: int | None = None
    multiple: int = 1
    rank_tile: tuple[int, int] = (1, 1)
    excludable: bool = True
    excludes: tuple[str, ...] = ()
    fails_unmended: bool = False
    engine_bits: int = 16
    group_scale_bits: int = 16
    products: str = "fp16"


@dataclass(frozen=True)
class Codes:
    """How the numbers of a linear lie in an ONNX graph.

    Attributes:
        bits: of a weight; None: those of the graph's unquantized weights.
        reach: what shares a scale.
        blocks: sizes of groups, the first that divides the inputs wins; empty: the format's group size.
        zero_points: every scale has a zero point of as many bits.
        scale_bytes: of a scale; None: those of the graph's unquantized numbers.
    """

    bits: int | None = None
    reach: Reach = Reach.TENSOR
    blocks: tuple[int, ...] = ()
    zero_points: bool = False
    scale_bytes: int | None = None


@dataclass(frozen=True)
class OnnxRuntime:
    """How a format goes to ONNX Runtime.

    Attributes:
        form: of the graph's linears, a key of ``LINEAR_FORMS`` in ``exporter/onnx/linear.py``.
        precision: what weights and products are, for reports.
        codes: what is stored.
        session_options: of the decoder's session.
        activations: torch's name of the dtype that inputs are rounded to in the exchange graph; None: not at all.
        integers: the engine rounds its inputs like that too and multiplies integers, which is exact: how many rows a product has does
            not change a row's numbers.
    """

    form: str
    precision: str
    codes: Codes
    session_options: Mapping[str, str] = field(default_factory=dict, hash=False)
    activations: str | None = None
    integers: bool = False


@dataclass(frozen=True)
class TensorRt:
    """How a format goes to TensorRT.

    Attributes:
        form: of the portable graph's linears, a key of ``PORTABLE_FORMS`` in ``exporter/onnx/portable/linear.py``.
        precision: what weights and products are, for reports.
        codes: what is stored.
        min_sm: the first GPU with the datatype.
        why: no older GPU.
        instead: the format to take then.
    """

    form: str
    precision: str
    codes: Codes
    min_sm: int = MIN_SM
    why: str = ""
    instead: str = "none"


@dataclass(frozen=True)
class HuggingFace:
    """How a format goes into ModelOpt's unified Hugging Face checkpoint.

    Attributes:
        parts: what a quantized linear is stored in; empty for 16 bit.
        fuses_weight_scales: whether linears that loaders fuse have one weight scale, as kernels of the format need it.
        group_bits: ``num_bits`` of weights and inputs in config.json's ``config_groups``; None where there are no such groups.
    """

    parts: tuple[Part, ...] = ()
    fuses_weight_scales: bool = False
    group_bits: int | None = None


@dataclass(frozen=True)
class Rounding:
    """How weights get their scales where they are stored.

    Attributes:
        modelopt_config: attribute of ``modelopt.torch.quantization``.
        reach: what shares a scale.
        blocks: sizes of groups, the largest that divides the inputs wins; empty: the format's own.
        span: share of the largest magnitude that the largest code stands for.
        bits: of the weights, where the shape of ModelOpt's recipe is another than that of whoever stores them.
    """

    modelopt_config: str
    reach: Reach
    blocks: tuple[int, ...] = ()
    span: float = 1.0
    bits: int | None = None
