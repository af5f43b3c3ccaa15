"""What calibration yields, by Hugging Face module name: largest magnitudes, and smoothing factors a channel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from medusa_export.core.errors import CheckpointError
from medusa_export.core.json_fields import odd_value
from medusa_export.core.regular_files import found_instead

SCALES_FILE = "scales.safetensors"
_FORMAT = {"format": "medusa-export scales 1"}


@dataclass(frozen=True)
class Scales:
    """Results of a calibration; unitless, in the model's own numbers.

    Attributes:
        input_amax: largest magnitude of a linear's input, by module (``model.layers.0.self_attn.q_proj``,
            ``medusa_heads.0.0.linear``, ``medusa_heads.0.1``); after smoothing, where the format smooths.
        weight_amax: of its weight, likewise.
        kv_amax: of keys and values together, by layer.
        pre_quant_scale: factor that a linear's input is multiplied with and its weight divided by.  # float32 [in]
    """

    input_amax: dict[str, float] = field(default_factory=dict)
    weight_amax: dict[str, float] = field(default_factory=dict)
    kv_amax: dict[int, float] = field(default_factory=dict)
    pre_quant_scale: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, name, value in self._values():
            if not bool(torch.isfinite(value).all()) or not bool((value > 0).all()):
                raise CheckpointError(
                    f"{what} of {name}",
                    str(value.item()) if value.numel() == 1 else "a factor that is not finite or not above 0",
                    "a finite number above 0",
                    "train heads before quantizing them (zero weights have no scale), or check the weights for NaN",
                )

    def summary(self) -> dict[str, dict[str, float]]:
        """Count, smallest and largest value of every kind of scale, for people to look at."""
        found: dict[str, list[torch.Tensor]] = {}
        for what, _, value in self._values():
            found.setdefault(what, []).append(value)
        return {
            what: {"count": len(values), "min": min(float(v.min()) for v in values), "max": max(float(v.max()) for v in values)}
            for what, values in found.items()
        }  # fmt: skip

    def save(self, path: Path) -> None:
        """Write safetensors, ``{kind}/{module}``; floats keep every digit, so a loaded copy is the same."""
        tensors = {f"{what}/{name}": value.contiguous() for what, name, value in self._values()}
        path.write_bytes(save(tensors, _FORMAT))  # save_file would make it readable to its owner alone

    @classmethod
    def load(cls, path: Path) -> Scales:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: no such file, something else in it, or a scale that is not finite and above 0.
        """
        kind = found_instead(path)
        if kind is not None:
            raise CheckpointError(str(path), kind, "saved scales", "check the path")
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") != _FORMAT["format"]:
                    raise ValueError("no scales in it")
                return cls._of({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
            got = "no scales in it" if isinstance(error, ValueError) else f"no readable scales ({odd_value(error)})"
            raise CheckpointError(str(path), got, "saved scales", "calibrate again") from error

    @classmethod
    def _of(cls, tensors: Mapping[str, torch.Tensor]) -> Scales:
        tables: dict[str, dict] = {item.name: {} for item in fields(cls)}
        for name, value in tensors.items():
            what, _, module = name.partition("/")
            number = value if what == "pre_quant_scale" else value.item()
            tables[what][int(module) if what == "kv_amax" else module] = number
        return cls(**tables)

    def _values(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(kind, module or layer, value); amax are float64 so that they come back as they were."""
        for item in fields(self):
            for name, value in getattr(self, item.name).items():
                yield (
                    item.name,
                    str(name),
                    torch.as_tensor(value, dtype=None if torch.is_tensor(value) else torch.float64),
                )

    def require(self, needed: Mapping[str, Iterable[str | int]]) -> None:
        """Raise CheckpointError unless every kind of scale is there for the modules (or layers) named."""
        missing = [
            f"{what} of {name}" for what, names in needed.items() for name in names if name not in getattr(self, what)
        ]
        if missing:
            raise CheckpointError(
                missing[0],
                f"none, {len(missing)} missing in all",
                "a scale for everything that is quantized",
                "calibrate again with the same format, kv cache and heads as the export",
            )
