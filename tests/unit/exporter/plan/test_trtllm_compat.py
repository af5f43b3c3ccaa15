from __future__ import annotations

from typing import Any

import pytest

from medusa_export.core.errors import ConfigError, TreeError
from medusa_export.exporter.plan.trtllm_compat import release_warnings, require_no_gaps
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.contract.trtllm_releases import find_release
from medusa_export.heads.trees.tree import PRESETS, Tree
from medusa_export.quantize.formats import FORMATS

NONE = FORMATS["none"]
BASE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 97,
}  # fmt: skip


def config_of(model_type: str, **options: Any) -> DecoderConfig:
    return DecoderConfig.from_dict({"model_type": model_type, **BASE, **options})


def test_qwen3_needs_the_release_that_builds_qwen() -> None:
    with pytest.raises(ConfigError, match=r"1\.1\.0 with qwen3.*1\.2 or later"):
        release_warnings(config_of("qwen3"), find_release("1.1"), NONE)
    assert "q and k norms" in release_warnings(config_of("qwen3"), find_release("1.2.1"), NONE)[0]
    assert release_warnings(config_of("qwen2"), find_release("0.17"), NONE) == []


def test_sliding_window_is_said() -> None:
    long: dict[str, Any] = {"max_position_embeddings": 32768, "num_hidden_layers": 3}
    assert release_warnings(config_of("mistral", sliding_window=None, **long), find_release("1.2"), NONE) == []
    assert (
        release_warnings(config_of("mistral", sliding_window=4096), find_release("1.2"), NONE) == []
    )  # a context of 2048
    (warning,) = release_warnings(config_of("mistral", sliding_window=4096, **long), find_release("1.2"), NONE)
    assert "max_attention_window_size 4096)" in warning
    some = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 2}
    (warning,) = release_warnings(config_of("qwen2", **some, **long), find_release("1.2"), NONE)
    assert "max_attention_window_size 32768,32768,4096)" in warning


def test_awq_is_said() -> None:
    for name, form in FORMATS.items():
        found = release_warnings(config_of("llama"), find_release("0.17"), form)
        assert len(found) == (name in ("int4_awq", "w4a8_awq"))
        assert all("use_int8_weight" in warning for warning in found)


@pytest.mark.parametrize("choices", [[[1], [6], [7]], [[0], [2]], [[1], [1, 0]]])
def test_a_gap_in_the_first_level_is_refused(choices: list[list[int]]) -> None:
    with pytest.raises(TreeError, match=r"tree choice \[\d\]: got no \[[01]\] beside it .*without gaps"):
        require_no_gaps(Tree.from_choices(choices))


@pytest.mark.parametrize("choices", [[[0]], [[0], [1], [2]], [[0], [1], [1, 3]]])
def test_other_trees_have_no_gap(choices: list[list[int]]) -> None:
    require_no_gaps(Tree.from_choices(choices))


def test_presets_have_no_gap() -> None:
    for choices in PRESETS.values():
        require_no_gaps(Tree.from_choices(choices))
