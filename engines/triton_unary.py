"""The name under which Triton repositories that were written before it moved import their unary model."""

from medusa_export.engines.serving.triton.unary import UnaryModel

__all__ = ["UnaryModel"]
