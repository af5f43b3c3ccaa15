"""What quantization did to the weights, a row a layer, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from medusa_export.exporter.verify.comparison import WeightError

Recorded = dict[str, dict[str, float]]
COLUMNS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate/up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def recorded(errors: Mapping[str, WeightError]) -> Recorded:
    """As the manifest keeps it: tensor -> largest difference and signal-to-noise ratio in dB."""
    return {name: {"max": error.largest, "snr_db": round(error.snr_db, 2)} for name, error in errors.items()}


def error_table(errors: Recorded, when: str = "measured now") -> Table:
    """Worst signal-to-noise ratio (dB) of every kind of linear, by layer, and the largest difference of any weight in it."""
    title = f"quantization error, {when}: signal-to-noise ratio in dB, worst of each"
    table = Table("layer", *COLUMNS, "max |error|", title=title)
    layers: dict[str, dict[str, dict[str, float]]] = {}
    for name, error in errors.items():
        parts = name.split(".")
        layer = f"{int(parts[2]):>3}" if parts[0] == "model" else f"head {parts[1]}"
        layers.setdefault(layer, {})[name.removesuffix(".weight")] = error
    for layer, found in layers.items():
        if layer.startswith("head"):
            cells = [f"{min(e['snr_db'] for e in found.values()):.1f}", *[""] * (len(COLUMNS) - 1)]
        else:
            cells = [_worst(found, ends) for ends in COLUMNS.values()]
        table.add_row(layer, *cells, f"{max(error['max'] for error in found.values()):.3g}")
    return table


def _worst(found: Mapping[str, Any], ends: tuple[str, ...]) -> str:
    values = [error["snr_db"] for name, error in found.items() if name.endswith(ends)]
    return f"{min(values):.1f}" if values else "16 bit"
