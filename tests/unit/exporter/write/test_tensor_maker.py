"""Chunks of rows: wherever they end, the bytes are the same; and values that cannot be written are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medusa_export.core.errors import CheckpointError
from medusa_export.exporter.verify import rebuild
from medusa_export.exporter.verify.checkpoint import verify_trtllm
from medusa_export.exporter.write import tensor_maker
from medusa_export.quantize.formats import FORMATS

WIDE: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 512, "head_dim": 128, "num_hidden_layers": 1}


@pytest.mark.slow
@pytest.mark.parametrize("weight_format", FORMATS)
def test_chunks_do_not_show(
    weight_format: str, make_case: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case("qwen2", vocab_size=513, **WIDE)
    whole = case.write(tmp_path / "whole", weight_format, tp=2)
    monkeypatch.setattr(tensor_maker, "CHUNK_VALUES", 5 * 512)  # 4 rows, as two of INT4 share a byte
    monkeypatch.setattr(rebuild, "CHUNK_VALUES", 7 * 512)
    sizes, stacked = [], tensor_maker.TensorMaker.stacked

    def noted(*arguments: Any) -> torch.Tensor:
        rows = stacked(*arguments)
        sizes.append(rows.numel())
        return rows

    monkeypatch.setattr(tensor_maker.TensorMaker, "stacked", noted)
    pieces = case.write(tmp_path / "pieces", weight_format, tp=2)
    assert max(sizes) <= 5 * 512  # scales of rows and groups too
    for rank in range(2):
        assert (whole / f"rank{rank}.safetensors").read_bytes() == (pieces / f"rank{rank}.safetensors").read_bytes()
    assert verify_trtllm(pieces, case.checkpoint) == []


@pytest.mark.parametrize("weight_format", ["none", "fp8", "int8_sq", "fp8_rowwise"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(
    weight_format: str, value: float, make_case: Callable[..., Any], tmp_path: Path
) -> None:
    case = make_case()
    case.edit(lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"][-1, -1:].fill_(value))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.proj\..*finite|layers\.1\.mlp\.proj\..*calibrated"):
        case.write(tmp_path / "out", weight_format)


def test_smoothing_is_cut_with_the_columns(make_case: Callable[..., Any], tmp_path: Path) -> None:
    case = make_case()
    out, name = case.write(tmp_path / "out", "int8_sq", tp=2), "transformer.layers.0.mlp.proj.prequant_scaling_factor"
    parts = [load_file(out / f"rank{rank}.safetensors")[name] for rank in range(2)]
    expected = case.scales.pre_quant_scale["model.layers.0.mlp.down_proj"].to(torch.float16)
    assert torch.equal(torch.cat(parts), expected)
