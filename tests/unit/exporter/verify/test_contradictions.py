"""Contradictions within a checkpoint, found without the model that it was made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from medusa_export.core.json_fields import read_json
from medusa_export.exporter.verify.contradictions import (
    config_contradictions,
    shared_scale_contradictions,
    weight_contradictions,
)
from medusa_export.exporter.verify.rebuild import open_ranks

SCALE = "transformer.layers.0.mlp.fc.weights_scaling_factor"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def weights(out: Path) -> list[str]:
    config = read_json(out / "config.json")
    return list(weight_contradictions(config, open_ranks(out, config)))


def scales(out: Path) -> list[str]:
    config = read_json(out / "config.json")
    return list(shared_scale_contradictions(config, open_ranks(out, config)))


@pytest.fixture
def two_ranks(make_case: Callable[..., Any], tmp_path: Path) -> Path:
    out: Path = make_case(tie_word_embeddings=False).write(tmp_path / "out", "fp8", tp=2, kv_cache="fp8")
    assert (weights(out), scales(out)) == ([], [])
    return out


def test_padding_copies_and_scales(two_ranks: Path) -> None:
    edit(two_ranks / "rank1.safetensors", lambda all_: all_["lm_head.weight"][-1].fill_(1))
    assert weights(two_ranks) == ["lm_head.weight: padding rows of rank 1 that are not zero"]
    edit(two_ranks / "rank1.safetensors", lambda all_: all_["transformer.ln_f.weight"].mul_(2))
    assert "model.norm.weight: rank 1 holds a different copy than the ranks before it" in weights(two_ranks)
    edit(two_ranks / "rank1.safetensors", lambda all_: all_[SCALE].mul_(2))
    assert scales(two_ranks) == [
        f"{SCALE} differs between ranks",
        f"rank1: {SCALE} and that of gate differ; trtllm-build fuses the two",
    ]


def test_swapped_ranks_by_their_padding(two_ranks: Path) -> None:
    one, other = (two_ranks / f"rank{rank}.safetensors" for rank in (0, 1))
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    assert "lm_head.weight: rank 0 ends in the padding of rank 1: the ranks are swapped" in weights(two_ranks)


def test_a_tied_matrix(make_case: Callable[..., Any], tmp_path: Path) -> None:
    out = make_case(tie_word_embeddings=True).write(tmp_path / "out")
    assert weights(out) == []
    edit(out / "rank0.safetensors", lambda all_: all_["lm_head.weight"][3:5].mul_(2))
    assert weights(out) == ["lm_head is tied to the embedding, and 2 of its 97 rows differ"]


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"rotary_scaling": {"type": "llama3", "factor": 8.0}}, "rotary_scaling of type llama3 without low_freq_factor"),
        ({"rotary_scaling": {"type": "linear", "rope_type": "yarn", "factor": 8.0}}, "type 'linear' and rope_type 'yarn'"),
        ({"model_type": "qwen2", "qwen_type": "qwen2", "attn_bias": False}, "qwen2 always has biases of q, k and v"),
    ],
)  # fmt: skip
def test_config(values: dict[str, Any], found: str, make_case: Callable[..., Any], tmp_path: Path) -> None:
    config = read_json(make_case().write(tmp_path / "out") / "config.json")
    assert list(config_contradictions(config)) == []
    assert found in next(config_contradictions({**config, **values}))
