"""Cached rows against the model run example by example, and what a cache keeps over runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medusa_export.core.errors import ConfigError
from medusa_export.heads.checkpoint.medusa_checkpoint import load_reference
from medusa_export.heads.training import hidden_states as hidden_cache
from medusa_export.heads.training.dataset import Example
from medusa_export.heads.training.hidden_states import NO_LABEL, build_cache, cache_bytes

EXAMPLES = [
    Example([5, 6, 7, 8, 9], [False, False, True, True, True]),
    Example([1, 2, 3, 4, 5, 6, 7, 8], [False, True, True, False, False, True, True, True]),
    Example([9, 8, 7], [False, True, True]),
]


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Any], tmp_path: Path) -> Any:
    tiny_checkpoint(tmp_path / "base", "llama")
    return load_reference(tmp_path / "base", torch.float32)


def test_rows_are_the_states_that_drafts_start_from(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden_cache, "SHARD_EXAMPLES", 2)
    size = model.config.hidden_size
    rows = build_cache(tmp_path / "cache", lambda: model, EXAMPLES, key="a", hidden_size=size)
    assert rows.tokens.tolist() == [7, 8, 9, 2, 3, 6, 7, 8, 8, 7]
    assert rows.answers.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    labels = rows.labels(2)
    assert labels[:, 0].tolist() == [8, 9, NO_LABEL, 3, NO_LABEL, 7, 8, NO_LABEL, 7, NO_LABEL]
    assert labels[:, 1].tolist() == [9, NO_LABEL, NO_LABEL, NO_LABEL, NO_LABEL, 8, *[NO_LABEL] * 4]
    positions = [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 4), (1, 5), (1, 6), (2, 0), (2, 1)]
    with torch.no_grad():
        states = [model.model(torch.tensor([example.input_ids])).last_hidden_state[0] for example in EXAMPLES]
    expected = torch.stack([states[example][position] for example, position in positions])
    order = torch.tensor([9, 0, 4, 5, 1, 2, 3, 8, 7, 6])
    torch.testing.assert_close(rows.read(order), expected[order], atol=2e-2, rtol=2e-2)
    assert cache_bytes(EXAMPLES, size) >= sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.bf16"))


def test_more_data_keeps_what_was_computed(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_cache, "SHARD_EXAMPLES", 1)
    size, seen = model.config.hidden_size, list[int]()
    compute = hidden_cache.compute_states
    monkeypatch.setattr(
        hidden_cache, "compute_states", lambda model, part: seen.append(part[0].input_ids[0]) or compute(model, part)
    )
    build_cache(tmp_path / "cache", lambda: model, EXAMPLES[:2], key="a", hidden_size=size)
    build_cache(tmp_path / "cache", lambda: model, EXAMPLES, key="a", hidden_size=size)
    assert seen == [5, 1, 9]
    with pytest.raises(ConfigError, match="another model"):
        build_cache(tmp_path / "cache", lambda: model, EXAMPLES, key="b", hidden_size=size)
    next((tmp_path / "cache").glob("*.bf16")).write_bytes(b"12")
    with pytest.raises(ConfigError, match="2 bytes"):
        build_cache(tmp_path / "cache", lambda: model, EXAMPLES, key="a", hidden_size=size)
