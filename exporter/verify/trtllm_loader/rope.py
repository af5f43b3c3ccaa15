"""Rotary frequencies as TensorRT-LLM computes them from config.json, and as transformers does from the source's.

Source: ``RopeEmbeddingUtils`` in tensorrt_llm/functional.py; shares no code with the writer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Frequencies = tuple[npt.NDArray[np.float64], float]  # [head_dim / 2], and what cosines and sines are multiplied with


def trtllm_frequencies(config: Mapping[str, Any]) -> Frequencies | None:
    """Of a checkpoint's config.json; None for a scaling whose frequencies are not known."""
    scaling = config.get("rotary_scaling") or {"type": "none"}
    compute = _TYPES.get(scaling["type"])
    exponents = np.arange(0, config["head_size"], 2) / config["head_size"]
    return None if compute is None else compute(float(config["rotary_base"]) ** -exponents, scaling, config)


def same_frequencies(config: Mapping[str, Any], source: Mapping[str, Any], head_dim: int) -> bool:
    """Whether they are transformers', within a context of max_position_embeddings.

    Args:
        source: config.json of the Hugging Face model.
    """
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = AutoConfig.for_model(**source)
    parameters: dict[str, Any] = theirs.rope_parameters
    if parameters.get("rope_type", "default") == "default":
        expected, factor = float(parameters["rope_theta"]) ** -(np.arange(0, head_dim, 2) / head_dim), 1.0
    else:
        found, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](theirs, "cpu")
        expected = found.double().numpy()
    ours = trtllm_frequencies(config)
    return ours is not None and bool(
        np.allclose(ours[0], expected, rtol=1e-5) and math.isclose(ours[1], factor, rel_tol=1e-6)
    )


def _none(plain: npt.NDArray[np.float64], scaling: Mapping[str, Any], config: Mapping[str, Any]) -> Frequencies:
    return plain, 1.0


def _linear(plain: npt.NDArray[np.float64], scaling: Mapping[str, Any], config: Mapping[str, Any]) -> Frequencies:
    return plain / scaling.get("factor", 1.0), 1.0


def _llama3(plain: npt.NDArray[np.float64], scaling: Mapping[str, Any], config: Mapping[str, Any]) -> Frequencies:
    factor, low, high = (
        scaling.get(key, x) for key, x in (("factor", 8.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0))
    )
    turns = scaling.get("original_max_position_embeddings", 8192) * plain / (2 * math.pi)  # over the old context
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (kept + (1 - kept) / factor), 1.0


def _yarn(plain: npt.NDArray[np.float64], scaling: Mapping[str, Any], config: Mapping[str, Any]) -> Frequencies:
    factor, size, base = scaling.get("factor", 1.0), config["head_size"], float(config["rotary_base"])
    old = scaling.get("original_max_position_embeddings", 4096)

    def dimension(turns: float) -> float:
        return size * math.log(old / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(dimension(scaling.get("beta_slow", 1))), size - 1)
    ramp = np.clip((np.arange(size // 2) - low) / ((high - low) or 0.001), 0, 1)
    kept, divided = 1 - ramp, ramp
    above, below = (
        0.1 * scaling.get(key, default) * math.log(factor) + 1 if factor > 1 else 1.0
        for key, default in (("mscale", 1.0), ("mscale_all_dim", 0.0))
    )
    return plain * (kept + divided / factor), above / below


_TYPES: dict[str, Callable[[npt.NDArray[np.float64], Mapping[str, Any], Mapping[str, Any]], Frequencies]] = {
    "none": _none,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
