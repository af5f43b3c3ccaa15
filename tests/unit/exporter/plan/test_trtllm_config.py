"""config.json of every family and format, against files that people have read."""

from __future__ import annotations

import pytest

from medusa_export.exporter.plan.trtllm_config import trtllm_config
from medusa_export.heads.checkpoint.families import FAMILIES
from medusa_export.quantize.formats import FORMATS, KV_CACHE
from tests.paths import assert_golden
from tests.unit.exporter.plan.test_trtllm_layout import make_spec

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    assert_golden(f"config/{family}.json", trtllm_config(make_spec(family, **SIZES)))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name: str) -> None:
    """What differs from the 16-bit configuration, at two ranks."""
    plain, found = (
        trtllm_config(make_spec(tp=2, weight_format=weight_format, **SIZES)) for weight_format in ("none", name)
    )
    assert {key for key in found if found[key] != plain[key]} <= {"quantization"}
    assert_golden(f"config/quantization-{name}.json", found["quantization"])


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.quantizes_heads])
def test_quantized_heads(name: str) -> None:
    found = trtllm_config(
        make_spec(weight_format=name, quant_heads=True, exclude=("*mlp.proj",), vocab_size=256, **SIZES)
    )
    assert_golden(f"config/quantization-{name}-heads.json", found["quantization"])


@pytest.mark.parametrize("name", KV_CACHE)
def test_every_cache(name: str) -> None:
    found = trtllm_config(make_spec(weight_format="fp8", kv_cache=name, **SIZES))["quantization"]["kv_cache_quant_algo"]
    assert found == {"none": None, "fp8": "FP8", "int8": "INT8"}[name]


def test_scaled_rope() -> None:
    found = trtllm_config(make_spec(rope_scaling=LLAMA3, rope_theta=500000.0, max_position_embeddings=131072, **SIZES))
    assert found["rotary_base"] == 500000.0
    assert found["rotary_scaling"] == {**LLAMA3, "type": "llama3"}
