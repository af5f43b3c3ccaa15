"""Which formats and GPUs TensorRT takes, and what is said to those that it does not."""

from __future__ import annotations

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.quantize.format_facts import NotOffered
from medusa_export.quantize.formats import FORMATS
from medusa_export.quantize.tensorrt_targets import RTX_TARGETS, TARGETS, parse_gpus, tensorrt_form


def test_the_way_out_is_open() -> None:
    assert set(RTX_TARGETS) < set(TARGETS)
    able = {name for name, row in FORMATS.items() if not isinstance(row.tensorrt, NotOffered)}
    for row in FORMATS.values():
        if isinstance(row.tensorrt, NotOffered):
            assert row.tensorrt.why
            assert row.tensorrt.action.removeprefix("take ") in able
        else:
            assert row.tensorrt.instead in able


def test_parse() -> None:
    assert parse_gpus("sm120, SM89,sm89", FORMATS["fp8"]) == (89, 120)
    assert parse_gpus(None, FORMATS["none"]) == RTX_TARGETS
    assert parse_gpus(None, FORMATS["fp8"]) == (89, 120, 121)
    assert parse_gpus(None, FORMATS["nvfp4"]) == (120, 121)


@pytest.mark.parametrize(
    ("gpus", "quant", "message"),
    [
        (
            "sm80,sm89",
            "fp8",
            "--gpu sm80: got --quant fp8; expected some of sm89, .*FP8 begins with SM 89; or take --quant int8_sq",
        ),
        ("sm89", "nvfp4", "--gpu sm89: got --quant nvfp4; .*or take --quant fp8"),
        ("sm75", "none", "--gpu: got 'sm75'; expected some of sm80"),
        ("", "none", "--gpu: got ''"),
        ("h100", "none", "--gpu: got 'h100'"),
        (None, "w4a8_awq", "--quant w4a8_awq: got --engine tensorrt.*take int4_awq"),
    ],
)
def test_refusals(gpus: str | None, quant: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_gpus(gpus, FORMATS[quant])


def test_form() -> None:
    assert tensorrt_form(FORMATS["int8_wo"]).form == "int8"
