from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from medusa_export.exporter.verify.comparison import WeightError, compare_ranks
from medusa_export.exporter.verify.error_table import error_table, recorded


def test_errors_of_every_quantized_tensor(make_case: Callable[..., Any], tmp_path: Path) -> None:
    case = make_case()
    errors = compare_ranks(case.write(tmp_path / "out", "fp8", quant_heads=True), case.checkpoint).errors()
    assert len(errors) == 2 * 7 + 2 * 2
    name = "model.layers.1.mlp.down_proj.weight"
    source = case.checkpoint.read(name).float()
    scale = float(source.abs().max()) / 448
    error = (source / scale).to(torch.float8_e4m3fn).float() * scale - source
    assert errors[name].largest == pytest.approx(float(error.abs().max()), rel=1e-4)
    assert errors[name].snr_db == pytest.approx(20 * math.log10(float(source.norm() / error.norm())), abs=1e-3)


def test_nothing_quantized_nothing_recorded(make_case: Callable[..., Any], tmp_path: Path) -> None:
    case = make_case()
    assert compare_ranks(case.write(tmp_path / "out"), case.checkpoint).errors() == {}


def test_table_shows_the_worst_of_a_layer() -> None:
    errors = {
        "model.layers.0.self_attn.q_proj.weight": WeightError(0.1, 31.0),
        "model.layers.0.self_attn.k_proj.weight": WeightError(0.5, 29.04),
        "model.layers.10.mlp.up_proj.weight": WeightError(0.25, 20.0),
        "medusa_heads.1.0.linear.weight": WeightError(0.75, 25.0),
    }
    text = io.StringIO()
    Console(file=text, width=100).print(error_table(recorded(errors)))
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in text.getvalue().splitlines() if "│" in line
    ]
    assert rows == [
        ["0", "29.0", "16 bit", "16 bit", "16 bit", "0.5"],
        ["10", "16 bit", "16 bit", "20.0", "16 bit", "0.25"],
        ["head 1", "25.0", "", "", "", "0.75"],
    ]
