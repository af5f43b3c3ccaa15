"""Sizes of real models, from their config.json, against their model cards."""

from __future__ import annotations

from typing import Any

import pytest

from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.roofline.shape import HALF, ModelShape, Precision

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip


def shape_of(raw: dict[str, Any], heads: int = 4) -> ModelShape:
    return ModelShape.of(DecoderConfig.from_dict(raw), heads, 1)


@pytest.mark.parametrize(("raw", "parameters"), [(LLAMA_8B, 8_030_261_248), (LLAMA_70B, 70_553_706_496)])
def test_parameters(raw: dict[str, Any], parameters: int) -> None:
    shape = shape_of(raw)
    norms = (2 * shape.layers + 1) * shape.hidden
    weights = shape.layers * shape.layer_weights(1) + 2 * shape.projection_weights(1)
    assert weights + norms == parameters


def test_a_rank_holds_its_part() -> None:
    shape = shape_of(LLAMA_70B)
    assert 8 * shape.layer_weights(8) == shape.layer_weights(1)
    assert shape.local_kv_heads(16) == 1  # one is the least: two ranks hold the same one
    assert 16 * shape.layer_weights(16) > shape.layer_weights(1)
    assert shape.kv_values(1) == 2 * 8 * 128


def test_resident_bytes() -> None:
    shape = shape_of(LLAMA_8B)
    heads = 4 * (4096 * 4096 + 128256 * 4096)
    layers = shape.layers * shape.layer_weights(1)
    assert shape.resident_bytes(1, HALF, HALF) == 2 * (layers + 2 * 128256 * 4096 + heads)
    fp8 = Precision(8, "fp8")
    assert shape.resident_bytes(1, HALF, HALF) - shape.resident_bytes(1, fp8, HALF) == layers
    assert shape.resident_bytes(1, fp8, HALF) - shape.resident_bytes(1, fp8, fp8) == heads


def test_a_sliding_window_is_taken_over() -> None:
    mistral = LLAMA_8B | {"model_type": "mistral", "sliding_window": 4096}
    assert (shape_of(LLAMA_8B).window, shape_of(mistral).window) == (None, 4096)
