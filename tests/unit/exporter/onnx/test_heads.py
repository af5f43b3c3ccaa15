"""The heads' graphs against torch: draft ids are the top-k of every head, for every layout, vocabulary and depth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.onnx.heads import write_heads
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.contract.engine_info import HEADS_DATA, heads_file
from medusa_export.heads.decoding.reference import head_logits

TOP_K = 5

Drafts = Callable[..., np.ndarray]


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(64, generator=torch.Generator().manual_seed(11))


@pytest.fixture
def drafts(open_session: Callable[..., Any], tmp_path: Path) -> Drafts:
    """``drafts(checkpoint, hidden, *, depth, draft_vocab, int8) -> draft_ids [depth, TOP_K]``; all heads by default."""

    def run(checkpoint: MedusaCheckpoint, hidden: torch.Tensor, *, depth: int = 0, **options: Any) -> np.ndarray:
        write_heads(tmp_path, checkpoint, **({"top_k": TOP_K, "draft_vocab": None, "int8": False} | options))
        session = open_session(tmp_path / heads_file(depth or checkpoint.num_medusa_heads))
        return session.run(["draft_ids"], {"hidden_states": hidden[None].numpy()})[0][0]

    return run


@pytest.mark.parametrize("layout", ["v1", "v2", "vllm"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_top_k(
    layout: str, layers: int, tied: bool, hidden: torch.Tensor, make_case: Callable[..., Any], drafts: Drafts
) -> None:
    case = make_case("llama", layout, 3, layers, dtype=torch.float32, tie_word_embeddings=tied)
    ids = drafts(case.checkpoint, hidden)
    assert ids.tolist() == head_logits(case.checkpoint, hidden).topk(TOP_K).indices.tolist()
    assert len({tuple(row) for row in ids.tolist()}) == 3


@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_a_row_a_sequence(
    layout: str, make_case: Callable[..., Any], open_session: Callable[..., Any], tmp_path: Path
) -> None:
    case = make_case("llama", layout, 3, dtype=torch.float32)
    write_heads(tmp_path, case.checkpoint, top_k=TOP_K, draft_vocab=None, int8=False)
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(5))
    (ids,) = open_session(tmp_path / heads_file(2)).run(["draft_ids"], {"hidden_states": rows.numpy()})
    for row, found in zip(rows, ids, strict=True):
        assert found.tolist() == head_logits(case.checkpoint, row)[:2].topk(TOP_K).indices.tolist()


@pytest.mark.parametrize("layout", ["v1", "v2"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_depth_is_the_first_heads(
    layout: str, depth: int, hidden: torch.Tensor, make_case: Callable[..., Any], drafts: Drafts
) -> None:
    case = make_case("llama", layout, 3, dtype=torch.float16)
    ids = drafts(case.checkpoint, hidden, depth=depth)
    assert ids.tolist() == head_logits(case.checkpoint, hidden)[:depth].topk(TOP_K).indices.tolist()


@pytest.mark.parametrize("layout", ["v1", "v2"])
@pytest.mark.parametrize("int8", [False, True])
def test_all_depths_share_one_data_file(layout: str, int8: bool, make_case: Callable[..., Any], tmp_path: Path) -> None:
    case = make_case("llama", layout, 3)
    write_heads(tmp_path, case.checkpoint, top_k=TOP_K, draft_vocab=None, int8=int8)
    data = (tmp_path / HEADS_DATA).stat().st_size
    deepest = onnx.load(tmp_path / heads_file(3)).graph.initializer
    used = sum(len(tensor.raw_data) + 4096 for tensor in deepest)
    assert data <= used, "the data holds what the deepest graph reads, each tensor once"
    assert {path.name for path in tmp_path.glob("heads*.onnx*")} == {
        HEADS_DATA,
        *(heads_file(depth) for depth in (1, 2, 3)),
    }


@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_draft_vocab(layout: str, hidden: torch.Tensor, make_case: Callable[..., Any], drafts: Drafts) -> None:
    case = make_case("llama", layout, dtype=torch.bfloat16)
    allowed = torch.randperm(97, generator=torch.Generator().manual_seed(2))[:30]
    ids = drafts(case.checkpoint, hidden, draft_vocab=allowed)
    logits = head_logits(case.checkpoint, hidden)
    masked = torch.full_like(logits, -torch.inf).index_copy(1, allowed, logits[:, allowed])
    assert ids.tolist() == masked.topk(TOP_K).indices.tolist()
    assert ids.tolist() != logits.topk(TOP_K).indices.tolist()


@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_int8_ranks_almost_the_same(
    layout: str, hidden: torch.Tensor, make_case: Callable[..., Any], drafts: Drafts
) -> None:
    case = make_case("llama", layout, 3, dtype=torch.float32)
    ids = torch.from_numpy(drafts(case.checkpoint, hidden, int8=True))
    logits = head_logits(case.checkpoint, hidden)
    lost = logits.topk(TOP_K).values - logits.gather(1, ids)  # [H, TOP_K]: of every rank, the true logit given away
    assert lost.max() < 0.1 * logits.std()


def test_fewer_tokens_than_candidates(make_case: Callable[..., Any], tmp_path: Path) -> None:
    case = make_case()
    with pytest.raises(ConfigError, match="--draft-vocab: got 4 tokens; expected at least 5"):
        write_heads(tmp_path, case.checkpoint, top_k=TOP_K, draft_vocab=torch.arange(4), int8=False)
    assert not list(tmp_path.glob("heads*.onnx*"))
