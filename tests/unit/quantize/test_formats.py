from __future__ import annotations

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.quantize.formats import (
    FORMATS,
    KV_CACHE,
    Format,
    KvCache,
    check_heads,
    get_format,
    get_kv_cache,
    needs_calibration,
)

ROWS: list[Format | KvCache] = [*FORMATS.values(), *KV_CACHE.values()]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{type(row).__name__}-{row.name}")
def test_rows_are_consistent(row: Format | KvCache) -> None:
    table = FORMATS if isinstance(row, Format) else KV_CACHE
    assert table[row.name] is row
    assert row.description
    if isinstance(row, Format):
        assert row.nearest in FORMATS
        assert (row.group_size in row.group_sizes) == (row.group_size is not None)
        assert row.needs_calibration == (row.input_bound is not None or row.smooths)


def test_nearest_leads_to_16_bit() -> None:
    for form in FORMATS.values():
        seen = [form.name]
        while seen[-1] != "none":
            seen.append(FORMATS[seen[-1]].nearest)
            assert len(seen) < len(FORMATS)


def test_quant_algos_are_tensorrt_llms() -> None:
    # there is no "FP8_ROWWISE": QuantAlgo raises on it
    algos = {name: form.trtllm.algo for name, form in FORMATS.items()}
    assert algos == {
        "none": None,
        "fp8": "FP8",
        "fp8_rowwise": "FP8_PER_CHANNEL_PER_TOKEN",
        "int8_sq": "W8A8_SQ_PER_CHANNEL",
        "int8_wo": "W8A16",
        "int4_wo": "W4A16",
        "int4_awq": "W4A16_AWQ",
        "w4a8_awq": "W4A8_AWQ",
        "nvfp4": "NVFP4",
    }


def test_recipes_exist_in_modelopt() -> None:
    import modelopt.torch.quantization as mtq

    for row in FORMATS.values():
        assert row.modelopt_config is None or hasattr(mtq, row.modelopt_config)


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"an unknown name.*one of none, fp8, fp8_rowwise, int8_sq"):
        get_format("fp7")
    with pytest.raises(ConfigError, match=r"kv cache format 'int4'.*one of none, fp8, int8"):
        get_kv_cache("int4")


def test_group_sizes() -> None:
    assert get_format("int4_awq").group_size == 128
    assert get_format("int4_awq", 64).group_size == 64
    assert FORMATS["int4_awq"].group_size == 128
    with pytest.raises(ConfigError, match=r"--group-size: got 32 for int4_awq; expected one of 64, 128"):
        get_format("int4_awq", 32)
    with pytest.raises(ConfigError, match=r"--group-size: got 64 for fp8; expected none"):
        get_format("fp8", 64)


def test_calibration_for_weights_or_cache() -> None:
    needed = {(name, kv): needs_calibration(FORMATS[name], kv) for name in ("none", "fp8") for kv in ("none", "fp8")}
    assert needed == {("none", "none"): False, ("none", "fp8"): True, ("fp8", "none"): True, ("fp8", "fp8"): True}


def test_formats_that_cannot_quantize_heads() -> None:
    check_heads(FORMATS["fp8"], True)
    check_heads(FORMATS["int8_wo"], False)
    with pytest.raises(ConfigError, match=r"format int8_wo.*fp8"):
        check_heads(FORMATS["int8_wo"], True)
