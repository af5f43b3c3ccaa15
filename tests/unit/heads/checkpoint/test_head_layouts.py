"""open_heads: every layout gives the same canonical tensors; what does not fit the base model is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_export.core.errors import CheckpointError
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.checkpoint.head_layouts import HeadWeights, holds_heads, open_heads

HEADS, LAYERS = 3, 2
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def config() -> DecoderConfig:
    """The base model that ``tiny_heads`` fits."""
    raw = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 80, "vocab_size": 97}
    return DecoderConfig.from_dict({**raw, "num_hidden_layers": 2, "num_attention_heads": 4})


def _read(heads: HeadWeights) -> Tensors:
    return {name: heads.source.read(stored) for name, stored in heads.names.items()}


def _assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def _edit(directory: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Rewrite the heads' safetensors file through ``change``."""
    file = next(directory.glob("*.safetensors"))
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(change(tensors), file)
    return directory


def _set_config(directory: Path, **values: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("layout", ["v1", "v2"])
def test_fasterdecoding(
    tmp_path: Path, config: DecoderConfig, tiny_heads: Any, head_tensors: Any, layout: str, suffix: str
) -> None:
    directory = tiny_heads(tmp_path, layout, HEADS, LAYERS, suffix=suffix)
    expected = head_tensors(HEADS, LAYERS)
    if layout == "v2":
        expected = {name: tensor for name, tensor in expected.items() if ".linear." in name}
    for path in (directory, directory / f"medusa_lm_head.{suffix}"):
        heads = open_heads(path, config)
        assert (heads.num_heads, heads.num_layers, heads.layout) == (HEADS, LAYERS, f"medusa-{layout}")
        assert heads.shares_lm_head == (layout == "v2")
        assert heads.warnings == ()
        _assert_same(_read(heads), expected)
        assert set(heads.canonical_names()) == head_tensors(HEADS, LAYERS).keys()


def test_modelopt(
    tmp_path: Path, config: DecoderConfig, tiny_checkpoint: Any, tiny_heads: Any, head_tensors: Any
) -> None:
    directory = tiny_heads(tiny_checkpoint(tmp_path), "modelopt", HEADS, LAYERS)
    heads = open_heads(directory, config)
    assert (heads.num_heads, heads.num_layers, heads.layout) == (HEADS, LAYERS, "modelopt")
    assert heads.warnings == ()  # num_hidden_layers of the base model is no statement about the heads
    assert holds_heads(heads.source.names)
    _assert_same(_read(heads), head_tensors(HEADS, LAYERS))


def test_vllm(tmp_path: Path, config: DecoderConfig, tiny_heads: Any, head_tensors: Any) -> None:
    heads = open_heads(tiny_heads(tmp_path, "vllm", HEADS, LAYERS), config)
    assert (heads.num_heads, heads.num_layers, heads.layout) == (HEADS, LAYERS, "vllm")
    assert heads.warnings == ()
    _assert_same(_read(heads), head_tensors(HEADS, LAYERS))


@pytest.mark.parametrize("name", ["lm_head.weight", "lm_heads.0.weight"])
def test_vllm_with_one_lm_head(
    tmp_path: Path, config: DecoderConfig, tiny_heads: Any, head_tensors: Any, name: str
) -> None:
    def share(tensors: Tensors) -> Tensors:
        kept = {key: tensor for key, tensor in tensors.items() if key.startswith("blocks.")}
        return {**kept, name: tensors["lm_heads.0.weight"]}

    directory = _edit(tiny_heads(tmp_path, "vllm", HEADS, 1), share)
    if name == "lm_heads.0.weight":
        with pytest.raises(CheckpointError, match=r"medusa_heads\.1\.1\.weight: got no such tensor"):
            open_heads(directory, config)
        _set_config(directory, original_lm_head=True)
    heads = open_heads(directory, config)
    assert not heads.shares_lm_head  # the file brings its own, even if only one
    found, shared = _read(heads), head_tensors(HEADS, 1)["medusa_heads.0.1.weight"]
    assert all(torch.equal(found[f"medusa_heads.{head}.1.weight"], shared) for head in range(HEADS))
    assert torch.equal(found["medusa_heads.2.0.linear.bias"], head_tensors(HEADS, 1)["medusa_heads.2.0.linear.bias"])


def test_vllm_needs_an_lm_head_and_the_whole_vocabulary(tmp_path: Path, config: DecoderConfig, tiny_heads: Any) -> None:
    directory = tiny_heads(tmp_path, "vllm")
    _set_config(directory, truncated_vocab_size=97)
    assert open_heads(directory, config).num_heads == 3
    _set_config(directory, truncated_vocab_size=50)
    with pytest.raises(CheckpointError, match="truncated_vocab_size 50"):
        open_heads(directory, config)
    _set_config(directory, truncated_vocab_size=None)
    _edit(directory, lambda tensors: {**tensors, "token_map": torch.arange(50)})
    with pytest.raises(CheckpointError, match=r"a truncated vocabulary \(token_map\)"):
        open_heads(directory, config)
    _edit(directory, lambda tensors: {name: tensors[name] for name in tensors if name.startswith("blocks.")})
    with pytest.raises(CheckpointError, match="got no lm_heads"):
        open_heads(directory, config)


@pytest.mark.parametrize("prefix", ["medusa_heads.", "heads.", "medusa_head."])
def test_prefixes(tmp_path: Path, config: DecoderConfig, tiny_heads: Any, head_tensors: Any, prefix: str) -> None:
    directory = tiny_heads(tmp_path, "v1")
    _edit(directory, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    _assert_same(_read(open_heads(directory, config)), head_tensors())


def test_more_than_ten_heads_are_in_numerical_order(tmp_path: Path, config: DecoderConfig, tiny_heads: Any) -> None:
    heads = open_heads(tiny_heads(tmp_path, "v2", 12, 1), config)
    assert heads.num_heads == 12
    assert heads.canonical_names()[-3:] == (
        "medusa_heads.11.0.linear.weight",
        "medusa_heads.11.0.linear.bias",
        "medusa_heads.11.1.weight",
    )


def test_absent_biases(tmp_path: Path, config: DecoderConfig, tiny_heads: Any) -> None:
    directory = tiny_heads(tmp_path, "v1", 2, 2)
    _edit(directory, lambda tensors: {name: tensors[name] for name in tensors if not name.endswith("bias")})
    heads = open_heads(directory, config)
    assert "medusa_heads.0.0.linear.bias" not in heads.names
    assert "medusa_heads.0.0.linear.bias" in heads.canonical_names()
    _edit(directory, lambda tensors: {**tensors, "0.0.linear.bias": torch.zeros(64)})
    with pytest.raises(CheckpointError, match=r"medusa_heads\.0\.1\.linear\.bias: got no such tensor"):
        open_heads(directory, config)  # some biases but not all: rather a damaged file than a choice


def _drop(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensors[key] for key in tensors if key != name}


def _put(name: str, tensor: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: tensor}


def _poison(name: str, value: float) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        tensors[name].view(-1)[-1] = value
        return tensors

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _put("0.0.linear.weight", torch.zeros(32, 64)),
            r"0\.0\.linear\.weight: got shape \[32, 64\]; expected \[64, 64\]",
        ),
        (_put("1.0.linear.bias", torch.zeros(65)), r"1\.0\.linear\.bias: got shape \[65\]; expected \[64\]"),
        (_put("2.2.weight", torch.zeros(96, 64)), r"2\.2\.weight: got shape \[96, 64\]; expected \[97, 64\]"),
        (
            _drop("1.0.linear.weight"),
            r"medusa_heads\.1\.0\.linear\.weight: got no such tensor; expected 3 heads of 2 layers",
        ),
        (_drop("1.1.linear.bias"), r"medusa_heads\.1\.1\.linear\.bias: got no such tensor"),
        (_drop("0.2.weight"), r"medusa_heads\.0\.2\.weight: got no such tensor"),
        (_put("4.0.linear.weight", torch.zeros(64, 64)), r"medusa_heads\.3\.0\.linear\.weight: got no such tensor"),
        (_put("3.2.weight", torch.zeros(97, 64)), r"3\.2\.weight: got a tensor outside the numbering"),
        (_put("0.3.weight", torch.zeros(97, 64)), r"0\.3\.weight: got a tensor outside the numbering"),
        (
            _put("999999999.0.linear.weight", torch.zeros(64, 64)),
            r"medusa_heads\.3\.0\.linear\.weight: got no such tensor",
        ),
        (_poison("1.0.linear.weight", float("nan")), r"1\.0\.linear\.weight: got NaN or infinite values"),
        (_poison("2.2.weight", float("-inf")), r"2\.2\.weight: got NaN or infinite values"),
        (_poison("0.1.linear.bias", float("inf")), r"0\.1\.linear\.bias: got NaN or infinite values"),
        (_put("0.0.linear.weight", torch.zeros(64, 64, dtype=torch.int8)), r"0\.0\.linear\.weight: got dtype int8"),
        (
            _put("007.0.linear.weight", torch.zeros(64, 64)),
            r"007\.0\.linear\.weight: got a tensor that no known layout",
        ),
        (_put("\u0663.0.linear.weight", torch.zeros(64, 64)), r"got a tensor that no known layout has"),
        (_put("9" * 5000 + ".0.linear.weight", torch.zeros(1)), r"got a tensor that no known layout has"),
        (_put("0.0.linear.weight_scale", torch.ones(1)), r"weight_scale: got a tensor that no known layout has"),
        (_put("0.0.linear.extra", torch.ones(1)), r"0\.0\.linear\.extra: got a tensor that no known layout has"),
        (_put("heads.0.0.linear.bias", torch.zeros(64)), r"got the same tensor as (heads\.)?0\.0\.linear\.bias"),
        (_put("lm_head.weight", torch.zeros(97, 64)), r"lm_head\.weight: got one lm_head beside Medusa heads"),
        (lambda tensors: {"fc.weight": torch.ones(2)}, r"fc\.weight: got a tensor that no known layout has"),
        (lambda tensors: {"0.0.weight": torch.zeros(97, 64)}, r"no Medusa heads in 1 tensors \(0\.0\.weight \.\.\.\)"),
    ],
)
def test_damaged_heads(
    tmp_path: Path, config: DecoderConfig, tiny_heads: Any, change: Callable[[Tensors], Tensors], message: str
) -> None:
    directory = _edit(tiny_heads(tmp_path, "v1", 3, 2), change)
    with pytest.raises(CheckpointError, match=message):
        open_heads(directory, config)


def test_a_base_model_without_heads_says_what_it_holds(
    tmp_path: Path, config: DecoderConfig, tiny_checkpoint: Any
) -> None:
    directory = tiny_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"no Medusa heads in 21 tensors \(lm_head\.weight, "):
        open_heads(directory, config)


def test_quantized_heads_beside_a_base_model(
    tmp_path: Path, config: DecoderConfig, tiny_checkpoint: Any, tiny_heads: Any
) -> None:
    directory = tiny_heads(tiny_checkpoint(tmp_path), "modelopt")
    _edit(directory, _put("medusa_heads.0.1.weight_scale", torch.ones(1)))
    with pytest.raises(CheckpointError, match=r"medusa_heads\.0\.1\.weight_scale"):
        open_heads(directory, config)


@pytest.mark.parametrize(
    ("layout", "values", "message"),
    [
        ("v1", {"medusa_num_heads": 2}, "medusa_num_heads is 2, but 3 heads are stored; using 3"),
        ("v1", {"medusa_num_layers": 5}, "medusa_num_layers is 5, but 1 layers are stored; using 1"),
        ("v1", {"version": "2"}, "version 2 heads have no lm_head of their own, but these do; using it"),
        ("v1", {"medusa": {"num_medusa_heads": 7}}, "num_medusa_heads is 7, but 3 heads are stored; using 3"),
        ("vllm", {"num_heads": 4}, "num_heads is 4, but 3 heads are stored; using 3"),
        ("vllm", {"num_hidden_layers": 2}, "num_hidden_layers is 2, but 1 layers are stored; using 1"),
        ("vllm", {"medusa_fc_bias": False}, "medusa_fc_bias is false, but biases are stored; using them"),
        ("vllm", {"original_lm_head": True}, "original_lm_head, but every head has an lm_head of its own; using those"),
    ],
)
def test_a_config_that_disagrees_is_reported(
    tmp_path: Path, config: DecoderConfig, tiny_heads: Any, layout: str, values: dict[str, Any], message: str
) -> None:
    directory = tiny_heads(tmp_path, layout)
    _set_config(directory, **values)
    heads = open_heads(directory, config)
    assert heads.warnings == (f"{directory / 'config.json'}: {message}",)
    assert (heads.num_heads, heads.num_layers) == (3, 1)


def test_heads_without_a_config(tmp_path: Path, config: DecoderConfig, tiny_heads: Any) -> None:
    directory = tiny_heads(tmp_path, "v2")
    (directory / "config.json").unlink()
    assert open_heads(directory, config).warnings == ()


def test_a_directory_without_heads(tmp_path: Path, config: DecoderConfig, tiny_heads: Any) -> None:
    directory = tiny_heads(tmp_path / "heads")
    (directory / "medusa_lm_head.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(
        CheckpointError, match=r"expected one of medusa_lm_head\.safetensors, medusa_lm_head\.pt, model"
    ):
        open_heads(directory, config)
    (directory / "medusa_lm_head.safetensors").symlink_to("../elsewhere")
    assert open_heads(directory, config).num_heads == 3
    (tmp_path / "elsewhere").unlink()
    with pytest.raises(CheckpointError, match=r"medusa_lm_head\.safetensors: got a link to nothing"):
        open_heads(directory, config)


def test_a_tensor_without_a_name_beside_a_base_model(
    tmp_path: Path, config: DecoderConfig, tiny_checkpoint: Any, tiny_heads: Any
) -> None:
    directory = _edit(tiny_heads(tiny_checkpoint(tmp_path), "modelopt"), _put("", torch.ones(1)))
    assert open_heads(directory, config).num_heads == 3
