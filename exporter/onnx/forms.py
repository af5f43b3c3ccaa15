"""What ONNX Runtime makes of a format."""

from __future__ import annotations

from medusa_export.core.errors import ConfigError
from medusa_export.quantize.format_facts import OnnxRuntime
from medusa_export.quantize.formats import FORMATS, Format


def onnx_form(weight_format: Format) -> OnnxRuntime:
    """How a format goes to ONNX Runtime; ConfigError when it has no form for it."""
    if weight_format.onnxruntime is None:
        able = ", ".join(name for name, row in FORMATS.items() if row.onnxruntime is not None)
        raise ConfigError(
            f"--quant {weight_format.name}", "no ONNX form", f"one of {able}", "pass --engine none, or tensorrt"
        )
    return weight_format.onnxruntime
