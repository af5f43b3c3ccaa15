"""Heads as they are written are heads as they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.training.head_module import MedusaHeads


@pytest.mark.parametrize("own_lm_head", [False, True])
def test_saved_and_opened(own_lm_head: bool, tiny_checkpoint: Callable[..., Any], tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", "llama")
    lm_head = MedusaCheckpoint.open_base(base).read("lm_head.weight").float()
    heads = MedusaHeads(3, 2, lm_head, own_lm_head=own_lm_head)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    (tmp_path / "heads").mkdir()
    heads.save(tmp_path / "heads", torch.float32)
    found = MedusaCheckpoint.open(base, tmp_path / "heads")
    assert (found.num_medusa_heads, found.num_medusa_layers, found.heads_share_lm_head) == (3, 2, not own_lm_head)
    assert json.loads((tmp_path / "heads" / "config.json").read_text()).get("version") == (None if own_lm_head else "2")
    assert (tmp_path / "heads" / "medusa_lm_head.safetensors").stat().st_mode & 0o044

    again = MedusaHeads(3, 2, lm_head, own_lm_head=own_lm_head)
    again.load(found)
    assert all(torch.equal(a, b) for a, b in zip(heads.parameters(), again.parameters(), strict=True))


def test_new_heads_are_the_base_models_prediction() -> None:
    hidden = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(MedusaHeads(2, 3, torch.randn(11, 8))(hidden, 1), hidden)
