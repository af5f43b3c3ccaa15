"""What TensorRT builds for which GPUs; how each format goes to it stands in the format's row.

Found by building every pair with TensorRT-RTX 1.7.1.116 (``benchmarks/tensorrt_builds.py``); that data-centre TensorRT takes the same
forms where the GPU has the datatype is its documentation's word ("Support Matrix"), not tried.
"""

from __future__ import annotations

from collections.abc import Sequence

from medusa_export.core.errors import ConfigError
from medusa_export.quantize.format_facts import NotOffered, TensorRt
from medusa_export.quantize.formats import FORMATS, Format

RTX_TARGETS = (80, 86, 89, 120, 121)  # TensorRT-RTX builds for these without a GPU
TARGETS = (80, 86, 89, 90, 100, 103, 120, 121)  # and data-centre TensorRT for its own GPU among these


def parse_gpus(text: str | None, weight_format: Format) -> tuple[int, ...]:
    """Compute capabilities of ``--gpu sm89,sm120``, ascending; None takes all that TensorRT-RTX builds the format for.

    Raises:
        ConfigError: an unknown target, or one that the format does not run on.
    """
    facts = tensorrt_form(weight_format)
    if text is None:
        return tuple(sm for sm in RTX_TARGETS if sm >= facts.min_sm)
    names = [name.strip().lower() for name in text.split(",")]
    known = {f"sm{sm}": sm for sm in TARGETS}
    for name in names:
        if name not in known:
            raise ConfigError("--gpu", repr(name), f"some of {', '.join(known)}", "as in --gpu sm89,sm120")
    gpus = tuple(sorted({known[name] for name in names}))
    if gpus[0] < facts.min_sm:
        able = named([sm for sm in TARGETS if sm >= facts.min_sm])
        raise ConfigError(
            f"--gpu sm{gpus[0]}",
            f"--quant {weight_format.name}",
            f"some of {able}: {facts.why}",
            f"or take --quant {facts.instead}",
        )
    return gpus


def tensorrt_form(weight_format: Format) -> TensorRt:
    """How a format goes to TensorRT; ConfigError when it has no form for it."""
    if isinstance(weight_format.tensorrt, NotOffered):
        able = ", ".join(name for name, row in FORMATS.items() if isinstance(row.tensorrt, TensorRt))
        got = f"--engine tensorrt, and {weight_format.tensorrt.why}"
        raise ConfigError(f"--quant {weight_format.name}", got, f"one of {able}", weight_format.tensorrt.action)
    return weight_format.tensorrt


def named(gpus: Sequence[int]) -> str:
    """sm89, sm120"""
    return ", ".join(f"sm{sm}" for sm in gpus)
