"""Rotary scalings: TensorRT-LLM's own arithmetic on what is written gives transformers' frequencies, or the export is refused."""

from __future__ import annotations

from typing import Any

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.plan.trtllm_rope import require_rope, rotary_scaling
from medusa_export.exporter.verify.trtllm_loader.rope import same_frequencies
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.contract.trtllm_releases import find_release

RAW: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 256, "intermediate_size": 80, "num_hidden_layers": 1,
    "num_attention_heads": 4, "max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0}
SCALINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "linear": {"type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 2048,
    },
    "yarn": {**YARN, "original_max_position_embeddings": 2048},
    "yarn without the old context": YARN,
    "yarn with an attention factor": {**YARN, "original_max_position_embeddings": 2048, "attention_factor": 1.3},
    "yarn with an attention factor and a small factor": {"rope_type": "yarn", "factor": 1.5, "attention_factor": 1.3},
    "yarn with no attention factor": {**YARN, "original_max_position_embeddings": 2048, "attention_factor": 1.0},
    "yarn with scales": {**YARN, "original_max_position_embeddings": 2048, "mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn with one scale": {**YARN, "original_max_position_embeddings": 2048, "mscale": 0.7},
    "yarn with the other": {**YARN, "original_max_position_embeddings": 2048, "mscale_all_dim": 0.7},
    "yarn with turns": {**YARN, "original_max_position_embeddings": 2048, "beta_fast": 20, "beta_slow": 2},
    "yarn with null turns": {**YARN, "original_max_position_embeddings": 2048, "beta_fast": None, "beta_slow": None},
}  # fmt: skip


def config_of(scaling: dict[str, Any] | None, **changes: Any) -> DecoderConfig:
    return DecoderConfig.from_dict({**RAW, "rope_scaling": scaling, **changes})


def written(config: DecoderConfig) -> dict[str, Any]:
    return {"rotary_scaling": rotary_scaling(config), "rotary_base": config.rope_theta, "head_size": config.head_dim}


@pytest.mark.parametrize("name", SCALINGS)
def test_same_frequencies(name: str) -> None:
    config = config_of(SCALINGS[name])
    assert same_frequencies(written(config), config.raw, config.head_dim)


def test_the_old_context_beside_the_scaling() -> None:
    """transformers takes the one at top level first."""
    config = config_of({**YARN, "original_max_position_embeddings": 4096}, original_max_position_embeddings=1024)
    scaling = rotary_scaling(config)
    assert scaling is not None
    assert scaling["original_max_position_embeddings"] == 1024
    assert same_frequencies(written(config), config.raw, config.head_dim)


@pytest.mark.parametrize(
    "changes",
    [
        {"factor": 2.0}, {"original_max_position_embeddings": 4096}, {"mscale": 1.1}, {"mscale_all_dim": 1.0},
        {"beta_slow": 4}, {"type": "linear"}, {"type": "longrope"},
    ],
    ids=str,
)  # fmt: skip
def test_other_frequencies_are_found(changes: dict[str, Any]) -> None:
    config = config_of(SCALINGS["yarn"])
    right = written(config)
    wrong = {**right, "rotary_scaling": {**right["rotary_scaling"], **changes}}
    assert not same_frequencies(wrong, config.raw, config.head_dim)
    assert not same_frequencies({**right, "rotary_base": 10000.0}, config.raw, config.head_dim)
    assert not same_frequencies({**right, "rotary_scaling": None}, config.raw, config.head_dim)


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32, "factor": 2.0}


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (LONG, "longrope; expected default, linear, llama3, yarn or dynamic; .*--format hf"),
        ({**YARN, "truncate": False}, "yarn with truncate false"),
        ({**YARN, "factor": 1.0, "attention_factor": 1.2}, "attention_factor 1.2 and factor 1"),
    ],
)
def test_refused(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        require_rope(config_of(scaling), find_release("1.2.1"))


def test_yarn_by_release() -> None:
    require_rope(config_of(YARN), find_release("0.19"))
    require_rope(config_of(SCALINGS["llama3"]), find_release("0.17"))
    with pytest.raises(ConfigError, match=r"--trtllm-version 0\.18\.2 with rope_scaling 'yarn'.*0\.19 or later"):
        require_rope(config_of(YARN), find_release("0.18"))
