"""What a graph has to agree with: the model's numbers, from the source's config.json or from that of the TensorRT-LLM checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from medusa_export.heads.checkpoint.decoder_config import DecoderConfig


@dataclass(frozen=True)
class Facts:
    """The numbers of a decoder; names follow Hugging Face."""

    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    num_medusa_heads: int

    @classmethod
    def of_source(cls, config: DecoderConfig, num_medusa_heads: int) -> Facts:
        """From the checkpoint."""
        names = [name for name in cls.__dataclass_fields__ if name != "num_medusa_heads"]
        return cls(**{name: getattr(config, name) for name in names}, num_medusa_heads=num_medusa_heads)

    @classmethod
    def of_trtllm(cls, config: Mapping[str, Any]) -> Facts:
        """From config.json of a TensorRT-LLM checkpoint."""
        theirs = {
            "head_dim": "head_size", "rms_norm_eps": "norm_epsilon", "rope_theta": "rotary_base",
            "rope_scaling": "rotary_scaling",
        }  # fmt: skip
        return cls(**{name: config.get(theirs.get(name, name)) for name in cls.__dataclass_fields__})  # type: ignore[arg-type]

    def rotary(self, max_length: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and sines of every position; None for scalings whose frequencies are not computed here.  # 2 x [T, head_dim / 2]

        Sources: RoFormer (arXiv 2104.09864) and Meta's Llama 3.1 reference for "llama3".
        """
        scaling = self.rope_scaling or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            return None
        wave = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        frequencies = self.rope_theta**-wave
        if kind == "linear":
            frequencies = frequencies / scaling["factor"]
        if kind == "llama3":
            frequencies = _llama3(frequencies, scaling)
        angles = torch.outer(torch.arange(max_length, dtype=torch.float64), frequencies)
        return angles.cos(), angles.sin()


def _llama3(frequencies: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Long waves are stretched, short ones kept, those in between blended."""
    old, low, high = (
        scaling[f"{name}"] for name in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    length = 2 * math.pi / frequencies
    smooth = ((old / length - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequencies / scaling["factor"] + smooth * frequencies
