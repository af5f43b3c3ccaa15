"""The name under which Triton repositories that were written before it moved import their model."""

from medusa_export.engines.serving.triton.model import MedusaModel

__all__ = ["MedusaModel"]
