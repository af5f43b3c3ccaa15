"""read_rope: both spellings, and every number that a scaling needs."""

from __future__ import annotations

from typing import Any

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.heads.checkpoint.rope import SCALINGS, read_rope

GOOD: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 4},
    "yarn": {"factor": 4.0, "attention_factor": 1.2, "beta_fast": 32.0, "mscale_all_dim": 0.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [1, 2, 3.5, 4]},
}


def read(raw: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
    return read_rope(raw, "config.json", default_theta=10000.0, head_dim=8)


@pytest.mark.parametrize("rope_type", SCALINGS)
def test_every_scaling_in_every_spelling(rope_type: str) -> None:
    numbers = GOOD[rope_type]
    expected = {"rope_type": rope_type, **numbers}
    assert read({"rope_scaling": expected}) == (10000.0, expected)
    assert read({"rope_theta": 5e5, "rope_scaling": {"type": rope_type, **numbers}}) == (
        5e5,
        {**expected, "type": rope_type},
    )
    assert read({"rope_theta": 1.0, "rope_parameters": {**expected, "rope_theta": 5e5}}) == (5e5, expected)


def test_none() -> None:
    for raw in ({}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}):
        assert read(raw) == (10000.0, None)


@pytest.mark.parametrize("rope_type", SCALINGS)
@pytest.mark.parametrize("value", [None, "8", True, -1.0, 0, float("nan"), float("inf"), []])
def test_every_number_is_needed(rope_type: str, value: object) -> None:
    for key in SCALINGS[rope_type] or ("short_factor", "long_factor"):
        with pytest.raises(ConfigError, match=rf"config\.json: got rope_scaling\.{key} = "):
            read({"rope_scaling": {"rope_type": rope_type, **GOOD[rope_type], key: value}})


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"rope_theta": 0}, "rope_theta = 0; expected a positive number"),
        ({"rope_theta": 10**400}, "rope_theta = 1000"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta = '1e4'"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear'; expected an object"),
        ({"rope_parameters": [1]}, r"rope_parameters = \[1\]; expected an object"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope_scaling type = 'spiral'; expected one of default, linear"),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_scaling type = "),
        (
            {"rope_scaling": {"rope_type": "llama3", **GOOD["llama3"], "low_freq_factor": 4.0}},
            "low_freq_factor = 4.0; expected less than high_freq_factor = 4.0",
        ),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 1, 1, "x"]}},
            "rope_scaling.long_factor = 'x'",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": float("nan")}},
            "mscale = nan; expected a finite",
        ),
    ],
)
def test_what_makes_no_sense(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(raw)
