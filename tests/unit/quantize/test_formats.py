from __future__ import annotations

import pytest

from medusa_export.heads.errors import ConfigError
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
    assert table[row.nearest].exportable
    assert row.description
    assert row.exportable is False or row.nearest == row.name


def test_exportable_formats() -> None:
    assert [name for name, form in FORMATS.items() if form.exportable] == ["none", "fp8", "int8_wo"]
    assert [name for name, form in KV_CACHE.items() if form.exportable] == ["none", "fp8"]


def test_quant_algos_are_tensorrt_llms() -> None:
    # there is no "FP8_ROWWISE": QuantAlgo raises on it
    algos = {name: form.quant_algo for name, form in FORMATS.items()}
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

    for row in ROWS:
        assert row.modelopt_config is None or hasattr(mtq, row.modelopt_config)
    assert all(form.modelopt_config for form in FORMATS.values() if form.needs_calibration)


def test_errors_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'w4a8_awq'.*one of none, fp8, int8_wo; use fp8$"):
        get_format("w4a8_awq")
    with pytest.raises(ConfigError, match=r"an unknown name.*one of none, fp8, int8_wo"):
        get_format("fp7")
    with pytest.raises(ConfigError, match=r"kv cache format 'int8'.*use fp8$"):
        get_kv_cache("int8")


def test_calibration_for_weights_or_cache() -> None:
    needed = {(name, kv): needs_calibration(FORMATS[name], kv) for name in ("none", "fp8") for kv in ("none", "fp8")}
    assert needed == {("none", "none"): False, ("none", "fp8"): True, ("fp8", "none"): True, ("fp8", "fp8"): True}


def test_only_fp8_quantizes_heads() -> None:
    check_heads(FORMATS["fp8"], True)
    check_heads(FORMATS["int8_wo"], False)
    with pytest.raises(ConfigError, match=r"format int8_wo.*fp8"):
        check_heads(FORMATS["int8_wo"], True)
