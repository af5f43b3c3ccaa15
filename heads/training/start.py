"""What a training starts from: the shape of its heads, of those that are given where some are, known before any work."""

from __future__ import annotations

from pathlib import Path

from medusa_export.core.errors import ConfigError
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint

NUM_HEADS, NUM_LAYERS = 4, 1  # where nothing says otherwise


def head_shape(
    model_dir: Path,
    heads: Path | None,
    *,
    num_heads: int | None,
    num_layers: int | None,
    own_lm_head: bool,
    takes_more: bool,
) -> tuple[int, int]:
    """Heads and residual blocks of each that are trained. Reads headers only.

    Args:
        heads: existing ones to start from.
        num_heads, num_layers: as asked for; None takes what the existing heads have.
        own_lm_head: whether every head gets a vocabulary projection of its own.
        takes_more: whether heads may be added to those that exist.

    Raises:
        MedusaExportError: heads that cannot be read, or that such a training cannot start from.
    """
    if heads is None:
        return num_heads or NUM_HEADS, num_layers or NUM_LAYERS
    found = MedusaCheckpoint.open(model_dir, heads, check_values=False)
    stored, layers = found.num_medusa_heads, found.num_medusa_layers
    num_heads, num_layers = num_heads or stored, num_layers or layers
    fits = stored <= num_heads if takes_more else stored == num_heads
    if layers != num_layers or not fits:
        got = f"{stored} heads of {layers} layers"
        expected = f"{'at most ' if takes_more else ''}{num_heads} heads of {num_layers}"
        raise ConfigError(str(heads), got, expected, "leave out --num-heads and --num-layers")
    if not own_lm_head and not found.heads_share_lm_head:
        raise ConfigError(str(heads), "heads with lm_heads of their own", "heads without", "train layout v1 from them")
    return num_heads, num_layers
