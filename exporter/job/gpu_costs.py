"""Step costs on a GPU, from a model's shape and the formats of its weights and cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from medusa_export.core.errors import ConfigError
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.roofline.gpus import Gpu
from medusa_export.heads.roofline.shape import HALF, ModelShape, Precision
from medusa_export.heads.roofline.step import Deployment
from medusa_export.heads.trees.acceptance import Acceptance
from medusa_export.heads.trees.search import Candidate
from medusa_export.quantize.formats import FORMATS, Format, KvCache, check_heads, get_kv_cache

COMPARED = ("none", "fp8", "int4_awq")  # what decoding without heads is estimated for, beside the format asked for


@dataclass(frozen=True)
class Target:
    """What is to run on a GPU.

    Attributes:
        heads, head_layers: Medusa heads and blocks of each.
        quant_heads: whether the heads have the base's format.
    """

    config: DecoderConfig
    heads: int
    head_layers: int
    weight_format: Format
    kv_cache: str = "none"
    quant_heads: bool = False
    tp: int = 1

    def on(self, gpu: Gpu) -> Deployment:
        """The deployment that a step's cost is estimated for.

        Raises:
            ConfigError: a GPU without the formats' products, or ranks that do not divide the heads.
        """
        check_heads(self.weight_format, self.quant_heads)
        kv_cache = get_kv_cache(self.kv_cache)
        why = unsupported_reason(gpu, self.weight_format, kv_cache)
        if why:
            raise ConfigError(
                gpu.name, f"{self.weight_format.name}, kv cache {self.kv_cache}", why, "choose another format or GPU"
            )
        weights = precision(self.weight_format)
        shape = ModelShape.of(self.config, self.heads, self.head_layers)
        heads = weights if self.quant_heads else HALF
        return Deployment(shape, gpu, self.tp, weights, heads, 8 * kv_cache.bytes)

    def without_heads(self, gpu: Gpu) -> dict[str, Deployment]:
        """The same model in the usual formats that the GPU has, to decode without heads."""
        shape = ModelShape.of(self.config, 0, 0)
        formats = (FORMATS[name] for name in dict.fromkeys((*COMPARED, self.weight_format.name)))
        able = [
            weight_format
            for weight_format in formats
            if not unsupported_reason(gpu, weight_format) and weight_format.trtllm.products in gpu.operations
        ]
        cache = 8 * get_kv_cache(self.kv_cache).bytes
        return {
            f"{weight_format.name if weight_format.is_quantized else '16 bit'} without Medusa": Deployment(
                shape, gpu, self.tp, precision(weight_format), HALF, cache
            )
            for weight_format in able
        }


def precision(weight_format: Format) -> Precision:
    """Bits of a weight with its group's scale, and the products."""
    row = weight_format.trtllm
    scale = row.group_scale_bits / weight_format.group_size if weight_format.group_size else 0.0
    return Precision(row.engine_bits + scale, row.products)


def prediction(chosen: Candidate, counted: Acceptance, curve: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens a second without and with a tree at a curve's costs, the gain, and what that may be.

    Args:
        chosen: the tree, with its tokens per step and cost.
        counted: acceptance that the interval comes from.
        curve: a row of cost.json; milliseconds a step.
    """
    plain = curve["verify"][0]["ms"]
    interval = counted.speedup_interval(chosen)
    return {
        "estimated": curve["estimated"],
        "batch": curve["batch"],
        "past_length": curve["past_length"],
        "max_draft_len": chosen.tree.max_draft_len,
        "tokens_per_step": round(chosen.tokens_per_step, 4),
        "cost_ratio": round(chosen.cost_ratio, 4),
        "tokens_per_second": {
            "without_medusa": round(1e3 * curve["batch"] / plain, 2),
            "medusa": round(1e3 * curve["batch"] * chosen.speedup / plain, 2),
        },
        "speedup": round(chosen.speedup, 4),
        "speedup_interval": [round(end, 4) for end in interval] if interval else None,
    }


def unsupported_reason(gpu: Gpu, *formats: Format | KvCache) -> str:
    """Why a GPU cannot run a format, in a few words; empty where it can run all."""
    for each in formats:
        row, what = (each, f"kv cache {each.name}") if isinstance(each, KvCache) else (each.trtllm, each.name)
        if gpu.sm < row.min_sm:
            return f"{what} needs SM {row.min_sm} or newer"
        if row.max_sm is not None and gpu.sm > row.max_sm:
            return f"{what} runs up to SM {row.max_sm}"
    return ""
