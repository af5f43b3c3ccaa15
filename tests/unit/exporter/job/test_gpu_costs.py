"""Formats as the estimate sees them: none is missing, and GPUs are refused as everywhere else."""

from __future__ import annotations

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.job.gpu_costs import Target, precision, unsupported_reason
from medusa_export.heads.roofline.gpus import BY_KEY, GPUS
from medusa_export.quantize.formats import FORMATS, KV_CACHE, get_format
from tests.unit.heads.roofline.test_shape import LLAMA_8B, DecoderConfig

CONFIG = DecoderConfig.from_dict(LLAMA_8B)


def test_every_format_of_the_cache() -> None:
    for row in KV_CACHE.values():
        assert Target(CONFIG, 4, 1, FORMATS["none"], row.name).on(BY_KEY["h100"]).kv_bits == (
            8 if row.name != "none" else 16
        )


@pytest.mark.parametrize(
    ("name", "products"),
    [("none", "fp16"), ("fp8", "fp8"), ("int8_sq", "int8"), ("int4_awq", "fp16"), ("nvfp4", "fp4")],
)
def test_products(name: str, products: str) -> None:
    """Weight-only formats are multiplied in 16 bit."""
    assert precision(FORMATS[name]).operations == products


def test_scales_of_groups_count() -> None:
    assert precision(FORMATS["int4_awq"]).bits == 4 + 16 / 128
    assert precision(get_format("int4_awq", 64)).bits == 4 + 16 / 64
    assert precision(FORMATS["nvfp4"]).bits == 4.5
    assert precision(FORMATS["fp8"]).bits == 8


@pytest.mark.parametrize("name", FORMATS)
def test_products_are_in_the_hardware_wherever_the_format_runs(name: str) -> None:
    weight_format = FORMATS[name]
    for gpu in GPUS:
        if not unsupported_reason(gpu, weight_format):
            deployment = Target(CONFIG, 4, 1, weight_format).on(gpu)
            assert deployment.weights == precision(weight_format)
            assert deployment.heads.bits == 16


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="fp8 needs SM 89"):
        Target(CONFIG, 4, 1, FORMATS["fp8"]).on(BY_KEY["a100-80gb"])
    with pytest.raises(ConfigError, match="kv cache fp8 needs SM 89"):
        Target(CONFIG, 4, 1, FORMATS["none"], "fp8").on(BY_KEY["a100-80gb"])
    with pytest.raises(ConfigError, match="quantized heads"):
        Target(CONFIG, 4, 1, FORMATS["int8_wo"], quant_heads=True).on(BY_KEY["h100"])


def test_what_is_compared_is_what_the_gpu_can_run() -> None:
    def names(gpu: str, weight_format: str = "none") -> list[str]:
        return list(Target(CONFIG, 4, 1, FORMATS[weight_format]).without_heads(BY_KEY[gpu]))

    assert names("a100-80gb") == ["16 bit without Medusa", "int4_awq without Medusa"]
    assert names("h100", "fp8_rowwise") == [
        "16 bit without Medusa", "fp8 without Medusa", "int4_awq without Medusa", "fp8_rowwise without Medusa",
    ]  # fmt: skip
    assert names("b200", "nvfp4") == ["16 bit without Medusa", "fp8 without Medusa", "nvfp4 without Medusa"]
