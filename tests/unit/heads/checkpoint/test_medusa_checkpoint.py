"""MedusaCheckpoint: names resolve to the right tensors, and what transformers computes from them is the reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_export.core.errors import CheckpointError, ConfigError
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint, load_reference

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def _edit(file: Path, **tensors: torch.Tensor | None) -> None:
    """Put (or with None: drop) tensors; dots in names are written as two underscores."""
    stored = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name, tensor in tensors.items():
        stored.pop(name.replace("__", "."), None)
        if tensor is not None:
            stored[name.replace("__", ".")] = tensor
    save_file(stored, file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_base_and_heads_are_one_source(
    tmp_path: Path, family: str, tiny_checkpoint: Any, tiny_heads: Any, head_tensors: Any
) -> None:
    ckpt = tiny_checkpoint(tmp_path / "base", family)
    checkpoint = MedusaCheckpoint.open(ckpt, tiny_heads(tmp_path / "heads", "v1", 2, 2))
    assert (checkpoint.num_medusa_heads, checkpoint.num_medusa_layers) == (2, 2)
    assert not checkpoint.heads_share_lm_head
    assert checkpoint.warnings == ()
    expected = {**load_file(ckpt / "model.safetensors"), **head_tensors(2, 2)}
    assert set(checkpoint.names) == expected.keys()
    assert len(checkpoint.names) == len(expected)
    for name, tensor in expected.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == "float32"
        assert torch.equal(checkpoint.read(name), tensor)
        assert torch.equal(checkpoint.read_rows(name, 3, 9), tensor[3:9])
        if tensor.ndim == 2:
            assert torch.equal(checkpoint.read_columns(name, 10, 60), tensor[:, 10:60])


def test_files_are_all_that_is_read(tmp_path: Path, tiny_checkpoint: Any, tiny_heads: Any) -> None:
    ckpt = tiny_checkpoint(tmp_path / "base", max_shard_size="50KB")
    heads = tiny_heads(tmp_path / "heads")
    weights = {path for path in ckpt.iterdir() if path.name.startswith("model")}
    expected = {*weights, ckpt / "config.json", heads / "config.json", heads / "medusa_lm_head.safetensors"}
    files = MedusaCheckpoint.open(ckpt, heads).files
    assert set(files) == expected
    assert len(files) == len(expected)


def test_heads_inside_the_checkpoint(tmp_path: Path, tiny_checkpoint: Any, tiny_heads: Any, head_tensors: Any) -> None:
    combined = tiny_heads(tiny_checkpoint(tmp_path / "combined"), "modelopt")
    beside = tiny_checkpoint(tmp_path / "beside")
    tiny_heads(tmp_path / "v1")
    (tmp_path / "v1/medusa_lm_head.safetensors").rename(beside / "medusa_lm_head.safetensors")
    for ckpt in (combined, beside):
        checkpoint = MedusaCheckpoint.open(ckpt)
        assert checkpoint.warnings == ()
        name = "medusa_heads.2.1.weight"
        assert torch.equal(checkpoint.read(name), head_tensors()[name])
    (beside / "medusa_lm_head.safetensors").rename(combined / "medusa_lm_head.safetensors")
    with pytest.raises(CheckpointError, match=r"heads in the checkpoint and in medusa_lm_head\.safetensors"):
        MedusaCheckpoint.open(combined)
    with pytest.raises(CheckpointError, match="no Medusa heads in it; expected heads; pass --heads"):
        MedusaCheckpoint.open(beside)


def test_heads_from_another_combined_checkpoint_are_pointed_out(
    tmp_path: Path, tiny_checkpoint: Any, tiny_heads: Any
) -> None:
    combined = tiny_heads(tiny_checkpoint(tmp_path / "combined", seed=5), "modelopt")
    base = tiny_checkpoint(tmp_path / "base")
    checkpoint = MedusaCheckpoint.open(base, combined)
    assert checkpoint.warnings == (f"{combined}: it holds a base model too; the one in {base} is used",)
    stored = load_file(base / "model.safetensors")["model.norm.weight"]
    assert torch.equal(checkpoint.read("model.norm.weight"), stored)


@pytest.mark.parametrize("tied", [False, True])
def test_heads_without_lm_heads_read_the_bases(
    tmp_path: Path, tied: bool, tiny_checkpoint: Any, tiny_heads: Any
) -> None:
    ckpt = tiny_checkpoint(tmp_path / "base", tie_word_embeddings=tied)
    checkpoint = MedusaCheckpoint.open(ckpt, tiny_heads(tmp_path / "heads", "v2"))
    assert checkpoint.heads_share_lm_head
    stored = load_file(ckpt / "model.safetensors")
    assert ("lm_head.weight" in stored) != tied
    expected = stored["model.embed_tokens.weight" if tied else "lm_head.weight"]
    for name in ("lm_head.weight", "medusa_heads.0.1.weight", "medusa_heads.2.1.weight"):
        assert checkpoint.shape(name) == (97, 64)
        assert torch.equal(checkpoint.read(name), expected)
        assert torch.equal(checkpoint.read_rows(name, 48, 96), expected[48:96])
    assert not torch.equal(stored["model.embed_tokens.weight"], stored.get("lm_head.weight", torch.zeros(97, 64)))


def test_a_tied_config_with_a_stored_lm_head(tmp_path: Path, tiny_checkpoint: Any, tiny_heads: Any) -> None:
    ckpt = tiny_checkpoint(tmp_path / "base", tie_word_embeddings=True)
    heads = tiny_heads(tmp_path / "heads")
    embedding = load_file(ckpt / "model.safetensors")["model.embed_tokens.weight"].clone()
    _edit(ckpt / "model.safetensors", lm_head__weight=embedding)
    found = MedusaCheckpoint.open(ckpt, heads).read("lm_head.weight")
    assert torch.equal(found, load_reference(ckpt, torch.float32).get_output_embeddings().weight)
    embedding[96, 63] += 1
    _edit(ckpt / "model.safetensors", lm_head__weight=embedding)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: got another matrix than the embedding"):
        MedusaCheckpoint.open(ckpt, heads)


def test_absent_biases_read_zeros(tmp_path: Path, tiny_checkpoint: Any, tiny_heads: Any) -> None:
    heads = tiny_heads(tmp_path / "heads", "v2", 1, 2, dtype=torch.float16)
    _edit(heads / "medusa_lm_head.safetensors", **{"0__0__linear__bias": None, "0__1__linear__bias": None})
    checkpoint = MedusaCheckpoint.open(tiny_checkpoint(tmp_path / "base"), heads)
    name = "medusa_heads.0.1.linear.bias"
    assert checkpoint.shape(name) == (64,)
    assert checkpoint.dtype(name) == "float16"
    assert torch.equal(checkpoint.read(name), torch.zeros(64, dtype=torch.float16))
    assert torch.equal(checkpoint.read_rows(name, 8, 24), torch.zeros(16, dtype=torch.float16))


def test_an_unknown_name(tmp_path: Path, tiny_checkpoint: Any, tiny_heads: Any) -> None:
    checkpoint = MedusaCheckpoint.open(tiny_checkpoint(tmp_path / "base"), tiny_heads(tmp_path / "heads"))
    for name in ("medusa_heads.3.0.linear.weight", "medusa_heads.3.0.linear.bias", "model.layers.2.mlp.up_proj.weight"):
        with pytest.raises(CheckpointError, match="got no such tensor"):
            checkpoint.read(name)


def test_a_base_that_does_not_fit_its_config(tmp_path: Path, tiny_checkpoint: Any, tiny_heads: Any) -> None:
    heads = tiny_heads(tmp_path / "heads")
    ckpt = tiny_checkpoint(tmp_path / "base")
    _edit(ckpt / "model.safetensors", model__layers__1__mlp__down_proj__weight=None)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: got no such tensor"):
        MedusaCheckpoint.open(ckpt, heads)
    _edit(ckpt / "model.safetensors", model__layers__1__mlp__down_proj__weight=torch.zeros(80, 64))
    with pytest.raises(CheckpointError, match=r"got shape \[80, 64\]; expected \[64, 80\]"):
        MedusaCheckpoint.open(ckpt, heads)
    (ckpt / "config.json").unlink()
    with pytest.raises(ConfigError, match="no such file"):
        MedusaCheckpoint.open(ckpt, heads)


def test_layers_that_the_config_leaves_out(tmp_path: Path, tiny_checkpoint: Any, tiny_heads: Any) -> None:
    ckpt = tiny_checkpoint(tmp_path / "base")
    config = json.loads((ckpt / "config.json").read_text())
    (ckpt / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\..*: got layer 1; expected layers 0 \.\. 0"):
        MedusaCheckpoint.open(ckpt, tiny_heads(tmp_path / "heads"))


def test_tensors_that_the_config_has_no_place_for_are_reported(
    tmp_path: Path, tiny_checkpoint: Any, tiny_heads: Any
) -> None:
    ckpt = tiny_checkpoint(tmp_path / "base")
    _edit(ckpt / "model.safetensors", model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))
    assert MedusaCheckpoint.open(ckpt, tiny_heads(tmp_path / "heads")).warnings == ()
    _edit(ckpt / "model.safetensors", model__layers__0__self_attn__q_proj__bias=torch.ones(64))
    (warning,) = MedusaCheckpoint.open(ckpt, tmp_path / "heads").warnings
    assert warning == f"{ckpt}: 1 tensors are not used, the first one model.layers.0.self_attn.q_proj.bias"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_holds_the_same_weights(
    tmp_path: Path, family: str, tiny_checkpoint: Any, tiny_heads: Any
) -> None:
    ckpt = tiny_checkpoint(tmp_path / "base", family)
    checkpoint = MedusaCheckpoint.open(ckpt, tiny_heads(tmp_path / "heads", "v2"))
    model = load_reference(ckpt, torch.float32)
    assert not model.training
    state = model.state_dict()
    assert state.keys() == set(checkpoint.names) - set(checkpoint.heads.canonical_names())
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in state.items())
    assert load_reference(ckpt, torch.bfloat16).dtype == torch.bfloat16
    assert load_reference(ckpt, torch.float32)(torch.tensor([[1, 5, 9]])).logits.shape == (1, 3, 97)


def test_the_reference_is_never_filled_in(tmp_path: Path, tiny_checkpoint: Any) -> None:
    ckpt = tiny_checkpoint(tmp_path / "base")
    _edit(ckpt / "model.safetensors", model__norm__weight=None)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: got 1 missing tensors"):
        load_reference(ckpt, torch.float32)
    (ckpt / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="an unreadable file"):
        load_reference(ckpt, torch.float32)
    with pytest.raises(CheckpointError, match="absent"):
        load_reference(tmp_path / "absent", torch.float32)


def _bare(name: str) -> str:
    return name.removeprefix("model.")


# Names that a checkpoint may have instead, and whether its embedding is tied.
OTHER_NAMES: dict[str, tuple[Callable[[str], str], bool]] = {
    "tied under lm_head alone": (lambda name: name.replace("model.embed_tokens", "lm_head"), True),
    "saved without the lm_head": (_bare, True),
    "saved without a prefix": (_bare, False),
    "out of a wrapper": (lambda name: f"module.{name}", False),
    "out of two wrappers": (lambda name: f"module.module.{_bare(name)}", True),
}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("case", OTHER_NAMES)
def test_names_that_transformers_loads(
    case: str, suffix: str, tmp_path: Path, tiny_checkpoint: Any, tiny_heads: Any
) -> None:
    rename, tied = OTHER_NAMES[case]
    ckpt, heads = tiny_checkpoint(tmp_path / "base", tie_word_embeddings=tied), tiny_heads(tmp_path / "heads", "v2")
    expected = load_reference(ckpt, torch.float32).state_dict()
    stored = {rename(name): tensor for name, tensor in load_file(ckpt / "model.safetensors").items()}
    (ckpt / "model.safetensors").unlink()
    if suffix == "bin":
        torch.save(stored, ckpt / "pytorch_model.bin")
    else:
        save_file(stored, ckpt / "model.safetensors", metadata={"format": "pt"})
    checkpoint = MedusaCheckpoint.open(ckpt, heads)
    assert checkpoint.warnings == ()
    loaded = load_reference(ckpt, torch.float32).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor), name
        assert torch.equal(loaded[name], tensor), name


def test_one_tensor_under_two_names(tmp_path: Path, tiny_checkpoint: Any, tiny_heads: Any) -> None:
    ckpt = tiny_checkpoint(tmp_path / "base")
    _edit(ckpt / "model.safetensors", norm__weight=torch.ones(64))
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight and norm\.weight|norm\.weight and model\.norm\.weight"
    ):
        MedusaCheckpoint.open(ckpt, tiny_heads(tmp_path / "heads"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_that_config_does_not_say(
    dtype: torch.dtype, tmp_path: Path, tiny_checkpoint: Any, tiny_heads: Any
) -> None:
    ckpt = tiny_checkpoint(tmp_path / "base", dtype=dtype)
    config = json.loads((ckpt / "config.json").read_text())
    del config["dtype"]
    (ckpt / "config.json").write_text(json.dumps(config))
    assert MedusaCheckpoint.open(ckpt, tiny_heads(tmp_path / "heads")).config.dtype == str(dtype)[6:]


def test_the_reference_of_a_pickled_checkpoint(tmp_path: Path, tiny_checkpoint: Any, tiny_heads: Any) -> None:
    ckpt = tiny_checkpoint(tmp_path / "base")
    torch.save(dict(load_file(ckpt / "model.safetensors")), ckpt / "pytorch_model.bin")
    (ckpt / "model.safetensors").unlink()
    checkpoint = MedusaCheckpoint.open(ckpt, tiny_heads(tmp_path / "heads"))
    model = load_reference(ckpt, torch.float32)
    assert torch.equal(model.state_dict()["model.norm.weight"], checkpoint.read("model.norm.weight"))


def test_the_config_file_of_the_heads_is_believed_less_than_the_heads(
    tmp_path: Path, tiny_checkpoint: Any, tiny_heads: Any
) -> None:
    heads = tiny_heads(tmp_path / "heads", "v1", 5)
    (heads / "config.json").write_text(json.dumps({"medusa_num_heads": 2}))  # FasterDecoding's public 7B heads
    checkpoint = MedusaCheckpoint.open(tiny_checkpoint(tmp_path / "base"), heads)
    assert checkpoint.num_medusa_heads == 5
    assert len(checkpoint.warnings) == 1
