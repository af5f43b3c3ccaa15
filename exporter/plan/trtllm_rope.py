"""Rotary scalings as TensorRT-LLM's Llama and Qwen models take them, so that its frequencies are transformers'.

Sources: ``create_attention_const_params`` in tensorrt_llm/layers/attention.py and ``RopeEmbeddingUtils`` in functional.py, of 0.15
and of a copy that knows Gemma 3 (0.19 or later); transformers' modeling_rope_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from medusa_export.core.errors import ConfigError
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.contract.trtllm_releases import TrtllmRelease

YARN_SINCE = (0, 19)  # 0.15 multiplies every frequency by the factor instead; between the two no copy was read
_DROPPED = ("attention_factor", "truncate", "mscale", "mscale_all_dim")  # of yarn; all of them end up in its mscale


def rotary_scaling(config: DecoderConfig) -> dict[str, Any] | None:
    """``rotary_scaling`` of config.json: all that TensorRT-LLM would otherwise take from its own defaults is in it.

    Raises:
        ConfigError: a scaling that no release applies to these models.
    """
    scaling = config.rope_scaling
    return None if scaling is None else _SCALINGS[scaling["rope_type"]](config, scaling)


def require_rope(config: DecoderConfig, release: TrtllmRelease) -> None:
    """Raise ConfigError for a scaling that this release does not apply, or that none does."""
    scaling = rotary_scaling(config)
    if scaling is not None and scaling["type"] == "yarn" and release.numbers[:2] < YARN_SINCE:
        raise ConfigError(
            f"--trtllm-version {release.name} with rope_scaling 'yarn'",
            "a release that multiplies all frequencies by the factor",
            "0.19 or later",
            "use --trtllm-version 1.2.1",
        )


def _as_it_is(config: DecoderConfig, scaling: dict[str, Any]) -> dict[str, Any]:
    return {**scaling, "type": scaling["rope_type"]}


def _dynamic(config: DecoderConfig, scaling: dict[str, Any]) -> None:
    """Begins beyond max_position_embeddings, which is as far as an engine goes: TensorRT-LLM has no such scaling any more."""


def _llama3(config: DecoderConfig, scaling: dict[str, Any]) -> dict[str, Any]:
    return {**_as_it_is(config, scaling), "original_max_position_embeddings": original_length(config, scaling)}


def _yarn(config: DecoderConfig, scaling: dict[str, Any]) -> dict[str, Any]:
    if scaling.get("truncate", True) is not True:
        raise _unknown("yarn with truncate false", "yarn whose range of frequencies is rounded, as TensorRT-LLM does")
    factor, given = float(scaling["factor"]), scaling.get("attention_factor")
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    pair = (mscale, all_dim) if mscale and all_dim else (1.0, 0.0)  # transformers takes both or neither
    if given is not None and factor > 1:
        pair = (10.0 * (float(given) - 1.0) / math.log(factor), 0.0)  # TensorRT-LLM: 0.1 mscale ln(factor) + 1
    elif given is not None and given != 1:
        raise _unknown(f"yarn with attention_factor {given} and factor {factor:g}", "a factor above 1")
    kept = {key: value for key, value in _as_it_is(config, scaling).items() if key not in _DROPPED}
    return {
        **kept,
        "original_max_position_embeddings": original_length(config, scaling),
        "beta_fast": scaling.get("beta_fast") or 32,
        "beta_slow": scaling.get("beta_slow") or 1,
        "mscale": pair[0],
        "mscale_all_dim": pair[1],
    }


def _longrope(config: DecoderConfig, scaling: dict[str, Any]) -> dict[str, Any]:
    raise _unknown("longrope", "default, linear, llama3, yarn or dynamic")


def original_length(config: DecoderConfig, scaling: dict[str, Any]) -> int:
    """The context before scaling, by transformers' rule: TensorRT-LLM would take 4096 or 8192 where it is absent."""
    given = config.raw.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
    return int(given or config.max_position_embeddings)


def _unknown(got: str, expected: str) -> ConfigError:
    where = "rope_scaling in a TensorRT-LLM checkpoint"
    return ConfigError(where, got, expected, "write the checkpoint for vLLM with --format hf")


_SCALINGS: dict[str, Callable[[DecoderConfig, dict[str, Any]], dict[str, Any] | None]] = {
    "linear": _as_it_is,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
