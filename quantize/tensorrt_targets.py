"""What TensorRT builds for which GPUs: formats and targets, in tables that checks, help texts and tests are derived from.

Found by building every pair with TensorRT-RTX 1.7.1.116 (``benchmarks/tensorrt_builds.py``); that data-centre TensorRT takes the same
forms where the GPU has the datatype is its documentation's word ("Support Matrix"), not tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from medusa_export.core.errors import ConfigError
from medusa_export.quantize.formats import FORMATS, Format

RTX_TARGETS = (80, 86, 89, 120, 121)  # TensorRT-RTX builds for these without a GPU
TARGETS = (80, 86, 89, 90, 100, 103, 120, 121)  # and data-centre TensorRT for its own GPU among these


@dataclass(frozen=True)
class TensorRtForm:
    """How a format goes to TensorRT.

    Attributes:
        form: of the portable graph's linears; None where TensorRT has no kernel.
        precision: what weights and products are, for reports.
        min_sm: the first GPU with the datatype.
        why: no kernel, or no older GPU.
        instead: the format to take then.
    """

    form: str | None
    precision: str
    min_sm: int = 80
    why: str = ""
    instead: str = "none"


_FP8 = (89, "FP8 begins with SM 89", "int8_sq")
FORMS: dict[str, TensorRtForm] = {
    "none": TensorRtForm("float", "16-bit weights and products"),
    "fp8": TensorRtForm("fp8", "FP8 weights, activations and products", *_FP8),
    "fp8_rowwise": TensorRtForm("fp8_row", "FP8 weights, 16-bit products", *_FP8),
    "int8_sq": TensorRtForm("int8_sq", "INT8 weights, activations and products, smoothed"),
    "int8_wo": TensorRtForm("int8", "INT8 weights, 16-bit products"),
    "int4_wo": TensorRtForm("int4", "INT4 weights in blocks, 16-bit products"),
    "int4_awq": TensorRtForm("int4_awq", "INT4 AWQ weights, 16-bit products"),
    "w4a8_awq": TensorRtForm(
        None, "INT4 AWQ weights, FP8 activations", why="TensorRT has no INT4 weights with FP8 activations", instead="int4_awq"
    ),
    "nvfp4": TensorRtForm("nvfp4", "NVFP4 weights, activations and products", 100, "FP4 begins with SM 100", "fp8"),
}  # fmt: skip


def parse_gpus(text: str | None, fmt: Format) -> tuple[int, ...]:
    """Compute capabilities of ``--gpu sm89,sm120``, ascending; None takes all that TensorRT-RTX builds the format for.

    Raises:
        ConfigError: an unknown target, or one that the format does not run on.
    """
    form = tensorrt_form(fmt)
    if text is None:
        return tuple(sm for sm in RTX_TARGETS if sm >= form.min_sm)
    names = [name.strip().lower() for name in text.split(",")]
    known = {f"sm{sm}": sm for sm in TARGETS}
    for name in names:
        if name not in known:
            raise ConfigError("--gpu", repr(name), f"some of {', '.join(known)}", "as in --gpu sm89,sm120")
    gpus = tuple(sorted({known[name] for name in names}))
    if gpus[0] < form.min_sm:
        able = named([sm for sm in TARGETS if sm >= form.min_sm])
        raise ConfigError(
            f"--gpu sm{gpus[0]}",
            f"--quant {fmt.name}",
            f"some of {able}: {form.why}",
            f"or take --quant {form.instead}",
        )
    return gpus


def tensorrt_form(fmt: Format) -> TensorRtForm:
    """The row of a format; ConfigError when TensorRT has no form for it."""
    form = FORMS[fmt.name]
    if form.form is None:
        able = ", ".join(name for name in FORMATS if FORMS[name].form)
        raise ConfigError(
            f"--quant {fmt.name}", f"--engine tensorrt, and {form.why}", f"one of {able}", f"take {form.instead}"
        )
    return form


def named(gpus: Sequence[int]) -> str:
    """sm89, sm120"""
    return ", ".join(f"sm{sm}" for sm in gpus)
