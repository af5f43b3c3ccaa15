"""The name under which Triton repositories that were written before version 0.2 import their unary model; it moved."""

from medusa_export.engines.serving.triton.unary import UnaryModel

__all__ = ["UnaryModel"]
