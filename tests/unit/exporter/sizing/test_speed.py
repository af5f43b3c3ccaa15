"""Expected speeds of a plan: a row a GPU, with the gain where acceptance is known, else with what a tree has to yield."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medusa_export.exporter.job.gpu_costs import Target
from medusa_export.exporter.sizing.speed import estimate_speeds, known_acceptance
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.roofline.gpus import GPUS
from medusa_export.heads.roofline.step import step_ms
from medusa_export.heads.trees.acceptance import Acceptance
from medusa_export.quantize.formats import FORMATS
from tests.unit.heads.roofline.test_shape import LLAMA_8B, LLAMA_70B

LLAMA = Target(DecoderConfig.from_dict(LLAMA_8B), 4, 1, FORMATS["none"])
COUNTED = Acceptance(100, {(0,): 70, (1,): 10, (0, 0): 50, (0, 0, 0): 30})


def test_every_gpu() -> None:
    rows = estimate_speeds(LLAMA, None, max_draft_len=63, batch=1, context=2048)
    assert [row.gpu for row in rows] == [gpu.name for gpu in GPUS]
    for gpu, row in zip(GPUS, rows, strict=True):
        if row.reason:
            continue
        plain, tree = (float(step_ms(LLAMA.on(gpu), 1, nodes, 1024, medusa=nodes > 1)) for nodes in (1, 64))
        assert row.without_medusa == pytest.approx(1e3 / plain, rel=1e-3)
        assert row.step_ratio == pytest.approx(tree / plain, rel=1e-3)
        assert row.step_ratio_range[0] <= row.step_ratio <= row.step_ratio_range[1]
        assert row.predicted is None
    speed = {row.gpu: row.without_medusa for row in rows}
    assert speed["A100-80GB"] < speed["H100-80GB"] < speed["H200-141GB"] < speed["B200-192GB"]
    assert {row.reason for row in rows} == {""}


def test_gain_where_acceptance_is_known() -> None:
    rows = {row.gpu: row for row in estimate_speeds(LLAMA, COUNTED, max_draft_len=63, batch=1, context=2048)}
    found = rows["H100-80GB"].predicted
    assert found is not None
    assert found["max_draft_len"] == 4
    assert found["tokens_per_step"] == 2.6
    assert found["speedup"] == pytest.approx(2.6 / found["cost_ratio"], rel=1e-3)
    assert found["speedup_interval"][0] < found["speedup"] < found["speedup_interval"][1]
    assert found["tokens_per_second"]["medusa"] > found["tokens_per_second"]["without_medusa"]


def test_reasons() -> None:
    large = Target(DecoderConfig.from_dict(LLAMA_70B), 4, 1, FORMATS["fp8"])
    rows = {row.gpu: row.reason for row in estimate_speeds(large, None, max_draft_len=63, batch=1, context=2048)}
    assert rows["A100-80GB"] == "fp8 needs SM 89 or newer"
    assert rows["H100-80GB"] == "does not fit"
    assert rows["H200-141GB"] == ""


def test_acceptance_beside_the_heads(tmp_path: Path) -> None:
    assert known_acceptance(tmp_path) is None
    path = tmp_path / "acceptance.json"
    path.write_text(json.dumps({"positions": 10, "paths": [{"choice": [0], "count": 5}]}))
    for heads in (tmp_path, tmp_path / "medusa_lm_head.safetensors"):
        found = known_acceptance(heads)
        assert found is not None
        assert found.paths == {(0,): 5}
