from __future__ import annotations

from typing import Any

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.plan.trtllm_compat import release_warnings
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.contract.trtllm_releases import find_release

BASE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 97,
}  # fmt: skip


def config_of(model_type: str, **options: Any) -> DecoderConfig:
    return DecoderConfig.from_dict({"model_type": model_type, **BASE, **options})


def test_qwen3_needs_the_release_that_builds_qwen() -> None:
    with pytest.raises(ConfigError, match=r"1\.1\.0 with qwen3.*1\.2 or later"):
        release_warnings(config_of("qwen3"), find_release("1.1"))
    assert "q and k norms" in release_warnings(config_of("qwen3"), find_release("1.2.1"))[0]
    assert release_warnings(config_of("qwen2"), find_release("0.17")) == []


def test_sliding_window_is_said() -> None:
    assert release_warnings(config_of("mistral", sliding_window=None), find_release("1.2")) == []
    (warning,) = release_warnings(config_of("mistral", sliding_window=4096), find_release("1.2"))
    assert "max_attention_window_size 4096" in warning
