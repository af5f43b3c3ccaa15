"""What quantization-aware training can be asked for."""

from __future__ import annotations

from dataclasses import dataclass

from medusa_export.core.flags import NUMBER, flag
from medusa_export.quantize.formats import FORMATS

TARGETS = ("trtllm", "onnx")
PANEL = "Quantization"  # heading of --help


@dataclass(frozen=True)
class QatFlags:
    """What is rounded, and for whom.

    Attributes:
        quant: weight format, by its name in ``formats``.
        group_size: as for :func:`~medusa_export.quantize.formats.get_format`.
        target: "trtllm" or "onnx", whose roundings differ for ``int8_wo`` and ``int4_wo``.
        kv_cache: must be "none".
    """

    quant: str = flag(
        help="Train for a base model quantized to this format, with ModelOpt's quantizers in place.", panel=PANEL,
        choices=tuple(FORMATS),
    )  # fmt: skip
    group_size: int | None = flag(
        None,
        help="Input channels that share a scale.",
        panel=PANEL,
        default="the format's",
        requires="--quant",
        bounds=NUMBER,
    )
    target: str = flag("trtllm", help="Rounding to simulate.", panel=PANEL, choices=TARGETS, requires="--quant")
    kv_cache: str = "none"
