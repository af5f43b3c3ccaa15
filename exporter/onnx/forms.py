"""The forms in which ONNX Runtime's graphs store weights, and what each computes with."""

from __future__ import annotations

import torch

from medusa_export.core.errors import ConfigError
from medusa_export.quantize.formats import FORMATS, Format

PRECISION = {
    "float": "float32 arithmetic on 16/32-bit weights",
    "fp8": "the exported FP8 weights, float32 arithmetic",
    "fp8_row": "the exported FP8 weights, float32 arithmetic",
    "int8": "int8 weights in blocks, int8 arithmetic",
    "int8_row": "the exported INT8 weights, float32 arithmetic",
    "int4": "int4 weights in blocks, int8 arithmetic",
    "int4_awq": "the exported INT4 weights, int8 arithmetic",
}
INT8_PRODUCTS = {"session.qdq_matmulnbits_accuracy_level": "4"}
FOLDED = {"session.disable_quant_qdq": "1"}
# Blocks: MatMulNBits with 8-bit products; others: fold DequantizeLinear into float32 weights once, when the session is made.
SESSION_OPTIONS: dict[str, dict[str, str]] = {
    "float": {},
    **dict.fromkeys(("fp8", "fp8_row", "int8_row"), FOLDED),
    **dict.fromkeys(("int8", "int4", "int4_awq"), INT8_PRODUCTS),
}
# Storage -> dtype of activations in the exchange graph. TensorRT-LLM quantizes those of fp8_rowwise a token, which is not in it.
ACTIVATIONS = {"fp8": torch.float8_e4m3fn, "int8_row": torch.int8, "int4_fp8": torch.float8_e4m3fn}


def onnx_form(fmt: Format) -> str:
    """The ONNX form of a format; ConfigError when it has none."""
    if fmt.onnx is None:
        able = ", ".join(name for name, form in FORMATS.items() if form.onnx)
        raise ConfigError(f"--quant {fmt.name}", "no ONNX form", f"one of {able}", "pass --engine none, or tensorrt")
    return fmt.onnx
