"""The rotary embedding as config.json describes it, in the spellings of transformers 4 and 5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from medusa_export.core.json_fields import Fields

# The scalings that transformers and TensorRT-LLM share, and the numbers that each cannot do without.
SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": (),
}
_PER_FREQUENCY = {"longrope": ("short_factor", "long_factor")}


def read_rope(
    raw: Mapping[str, Any], where: str, *, default_theta: float, head_dim: int
) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling of the rotary frequencies.

    Args:
        raw: the whole config.json.
        where: its path, for errors.
        default_theta: the base where none is given.
        head_dim: rotated features of a head, two a frequency.

    Returns:
        the base, and None or the whole Hugging Face dictionary with ``rope_type``.

    Raises:
        ConfigError: an unknown scaling, or numbers that it needs and that are not there or make no sense.
    """
    fields = Fields(raw, where)
    parameters, older = (_object(fields, key) for key in ("rope_parameters", "rope_scaling"))
    if "rope_theta" in parameters and parameters["rope_theta"] is None:  # which transformers takes for a base
        raise fields.error("rope_parameters.rope_theta", None, "a positive number, or no such key")
    theta = Fields({"rope_theta": raw.get("rope_theta"), **parameters}, where).number("rope_theta", default_theta)
    scaling = {**older, **parameters}
    scaling.pop("rope_theta", None)
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type == "default":
        return theta, None
    if not isinstance(rope_type, str) or rope_type not in SCALINGS:
        raise fields.error("rope_scaling type", rope_type, f"one of default, {', '.join(SCALINGS)}")
    _check(Fields(scaling, where, "rope_scaling"), rope_type, head_dim)
    return theta, {**scaling, "rope_type": rope_type}


def _object(fields: Fields, key: str) -> dict[str, Any]:
    value = fields.raw.get(key) or {}
    if not isinstance(value, dict):
        raise fields.error(key, value, "an object")
    return value


def _check(scaling: Fields, rope_type: str, head_dim: int) -> None:
    for key in SCALINGS[rope_type]:
        scaling.number(key)
    for key in _PER_FREQUENCY.get(rope_type, ()):
        scaling.numbers(key, head_dim // 2)
    for key, value in scaling.raw.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise scaling.error(key, value, "a finite number")
        if type(value) is int and value != 0:
            Fields({key: abs(value)}, scaling.where, "rope_scaling").number(key)
    if rope_type == "llama3" and scaling.number("low_freq_factor") >= scaling.number("high_freq_factor"):
        low = scaling.raw["low_freq_factor"]
        raise scaling.error("low_freq_factor", low, f"less than high_freq_factor = {scaling.raw['high_freq_factor']}")
