"""Ranks are compared with the source while they are written, with the same result as afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medusa_export.core.artifacts.hashing import sha256
from medusa_export.core.errors import CheckpointError
from medusa_export.exporter.plan.spec import export_spec
from medusa_export.exporter.plan.trtllm_config import trtllm_config
from medusa_export.exporter.plan.trtllm_layout import plan_rank, require_scales
from medusa_export.exporter.verify.comparison import Comparison, compare_ranks
from medusa_export.exporter.write.safetensors import SafetensorsWriter
from medusa_export.exporter.write.tensor_maker import TensorMaker
from medusa_export.exporter.write.trtllm import write_rank
from medusa_export.quantize.formats import get_format
from tests.unit.exporter.conftest import TREE


def spec_of(case: Any, weight_format: str, tp: int) -> Any:
    return export_spec(
        case.checkpoint, get_format(weight_format), tree=TREE, tp=tp, dtype="auto", kv_cache="none", quant_heads=False
    )


@pytest.mark.parametrize("weight_format", ["none", "fp8", "fp8_rowwise", "int8_sq"])
@pytest.mark.parametrize(
    ("tp", "changes"), [(1, {}), (4, {"num_key_value_heads": 2})], ids=["tp1", "tp4, shared heads"]
)
def test_the_same_while_writing_as_afterwards(
    weight_format: str, tp: int, changes: dict[str, int], make_case: Callable[..., Any], tmp_path: Path
) -> None:
    case = make_case("qwen2", tie_word_embeddings=False, **changes)
    out, spec = case.write(tmp_path / "out", weight_format, tp=tp), spec_of(case, weight_format, tp)
    compared, scales = Comparison(trtllm_config(spec), case.checkpoint), require_scales(spec, case.scales)
    for rank in range(tp):
        path = tmp_path / f"rank{rank}"
        written = write_rank(
            path, case.checkpoint, spec, scales, rank, None, lambda path, rank=rank: compared.begin(rank, path)
        )
        assert path.read_bytes() == (out / f"rank{rank}.safetensors").read_bytes()
        assert (written.size, written.sha256) == (path.stat().st_size, sha256(path))
    assert compared.problems() == []
    assert compared.errors() == compare_ranks(out, case.checkpoint).errors()
    assert bool(compared.errors()) == (weight_format != "none")


def write_wrong(path: Path, case: Any, rank: int, wrong: str, index: int) -> Comparison:
    """A rank of two with one value one too large, compared while it is written."""
    spec = spec_of(case, "none", 2)
    compared = Comparison(trtllm_config(spec), case.checkpoint)
    maker = TensorMaker(case.checkpoint, spec, case.scales)
    with SafetensorsWriter(path, plan_rank(spec, rank).tensors) as writer:
        written = compared.begin(rank, path)
        for plan in writer.entries:
            rows = torch.cat(list(maker.rows(plan)))
            if plan.name == wrong:
                rows.view(-1)[index] += 1
            writer.write(rows)
            writer.follow(written, plan.name)
    return compared


def test_every_tensor_is_compared(make_case: Callable[..., Any], tmp_path: Path) -> None:
    """Whichever tensor of either rank is wrong: it is found while the file is being written."""
    case = make_case("qwen3", num_hidden_layers=1)
    for rank in range(2):
        for wrong in plan_rank(spec_of(case, "none", 2), rank).tensors:
            problems = write_wrong(tmp_path / "rank", case, rank, wrong.name, 0).problems()
            assert len(problems) == 1, wrong.name
            assert ": 1 of " in problems[0] or ": 1 values are not" in problems[0], wrong.name


def test_padding_ends_the_writing(make_case: Callable[..., Any], tmp_path: Path) -> None:
    case = make_case()  # 97 tokens: the second rank ends in a row of zeros
    with pytest.raises(CheckpointError, match=r"lm_head.weight: got padding rows"):
        write_wrong(tmp_path / "rank", case, 1, "lm_head.weight", -1)
