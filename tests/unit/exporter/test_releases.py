from __future__ import annotations

from typing import Any

import pytest

from medusa_export.exporter.releases import DEFAULT_RELEASE, RELEASES, parse_release, release_warnings
from medusa_export.heads.config import DecoderConfig
from medusa_export.heads.errors import ConfigError

BASE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 97,
}  # fmt: skip


def config_of(model_type: str, **options: Any) -> DecoderConfig:
    return DecoderConfig.from_dict({"model_type": model_type, **BASE, **options})


@pytest.mark.parametrize(
    ("text", "numbers"), [("0.17", (0, 17)), ("0.17.0.post1", (0, 17, 0)), ("1.2.1", (1, 2, 1)), ("1.0", (1, 0))]
)
def test_parse(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_release(text) == numbers


def test_every_release_is_taken() -> None:
    assert all(parse_release(release) for release in RELEASES)
    assert parse_release(DEFAULT_RELEASE) == (1, 2, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.3.0", r"no Medusa; expected at most 1.2.1; stay on 1.2.1, or serve the ONNX graph"),
        ("1.3.0rc12", "no Medusa"),
        ("2.0", "no Medusa"),
        ("0.16.0", "0.17 or later"),
        ("0.22", "which was not released"),
        ("latest", "'latest'; expected one of 0.17.0, 0.18.0"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_release(text)


def test_qwen3_needs_the_release_that_builds_qwen() -> None:
    with pytest.raises(ConfigError, match=r"1\.1 with qwen3.*1\.2 or later"):
        release_warnings(config_of("qwen3"), (1, 1))
    assert "q and k norms" in release_warnings(config_of("qwen3"), (1, 2, 1))[0]
    assert release_warnings(config_of("qwen2"), (0, 17)) == []


def test_sliding_window_is_said() -> None:
    assert release_warnings(config_of("mistral", sliding_window=None), (1, 2)) == []
    (warning,) = release_warnings(config_of("mistral", sliding_window=4096), (1, 2))
    assert "max_attention_window_size 4096" in warning
