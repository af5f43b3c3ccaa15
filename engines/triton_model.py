"""The name under which Triton repositories that were written before version 0.2 import their model; it moved."""

from medusa_export.engines.serving.triton.model import MedusaModel

__all__ = ["MedusaModel"]
