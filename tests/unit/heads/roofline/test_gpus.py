"""The table of GPUs: every figure has a source, and rates that do not contradict each other."""

from __future__ import annotations

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.heads.roofline.gpus import BY_KEY, GPUS, find_gpu


def test_what_users_ask_for_is_there() -> None:
    assert set(BY_KEY) == {"a100-40gb", "a100-80gb", "rtx3090", "l40s", "rtx4090", "h100", "h200", "b200"}
    assert len(BY_KEY) == len(GPUS) == len({gpu.name for gpu in GPUS})


def test_every_figure_has_a_source() -> None:
    for gpu in GPUS:
        assert set(gpu.sources) == {"memory", "bandwidth", "operations", "link"}
        assert all("NVIDIA" in source for source in gpu.sources.values())


def test_figures_are_dense_ones_and_bytes_a_second() -> None:
    """Half the width of a product's numbers gives twice the products; sparsity, left out, would give as much again."""
    for gpu in GPUS:
        rates = gpu.operations
        assert ("fp8" in rates) == (gpu.sm >= 89)
        assert ("fp4" in rates) == (gpu.sm >= 100)
        if "fp8" in rates:
            assert rates["fp8"] / rates["fp16"] == pytest.approx(2, rel=0.02)
        if "fp4" in rates:
            assert rates["fp4"] / rates["fp8"] == pytest.approx(2, rel=0.02)
        assert 0.5e12 < gpu.bandwidth < 10e12
        assert gpu.link < gpu.bandwidth


def test_names_as_typed() -> None:
    assert find_gpu("H100").name == "H100-80GB"
    with pytest.raises(ConfigError, match=r"--gpu-model: got 'v100'.*h100"):
        find_gpu("v100", "--gpu-model")
