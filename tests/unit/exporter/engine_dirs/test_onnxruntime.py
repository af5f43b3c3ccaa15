"""An engine directory is complete, says what it is, and runs from wherever it is moved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from medusa_export.core.errors import ConfigError, TreeError
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.exporter.engine_dirs.common import MIN_TOP_K
from medusa_export.exporter.engine_dirs.onnxruntime import write_engine, write_onnx
from medusa_export.exporter.onnx.forms import onnx_form
from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.trees.tree import Tree, load_tree
from medusa_export.quantize.formats import FORMATS, get_format

HEADS = {"heads-1.onnx", "heads-2.onnx", "heads-3.onnx", "heads.onnx.data"}
FILES = HEADS | {"decoder.onnx", "decoder.onnx.data", "engine.json", "tree.json"}


def operators(path: Path) -> dict[str, int]:
    """How often every operator occurs in a graph."""
    names = [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]
    return {name: names.count(name) for name in names}


def test_complete_and_movable(tiny_engine: Callable[..., Any], tmp_path: Path) -> None:
    made = tiny_engine("qwen2", tree=load_tree("cpu-3"))
    moved = tmp_path / "elsewhere"
    shutil.move(made.path, moved)
    shutil.rmtree(made.model_dir)
    assert {path.name for path in moved.iterdir()} >= FILES
    assert load_tree(str(moved / "tree.json")) == load_tree("cpu-3")
    assert len(read_tokenizer(moved)) == 97
    engine = OnnxRuntimeEngine(moved)
    assert 0 <= engine.prefill([1, 2, 3]) < 97
    for depth in (1, 2, 3):
        assert engine.draft(depth).shape == (depth, MIN_TOP_K)


def test_info_is_what_was_written(tiny_engine: Callable[..., Any]) -> None:
    made = tiny_engine("llama", "fp8", tree=Tree.from_choices([[12], [0]]), max_length=96)
    info = EngineInfo.load(made.path)
    assert (info.backend, info.form, info.max_length, info.max_depth, info.top_k) == ("onnxruntime", "fp8", 96, 3, 13)
    config = made.checkpoint.config
    for name in ("num_hidden_layers", "num_key_value_heads", "head_dim", "hidden_size", "vocab_size", "eos_token_ids"):
        assert getattr(info, name) == getattr(config, name), name
    assert info.source == {"checkpoint": "tiny"}
    info.save(made.path)
    assert EngineInfo.load(made.path) == info


def test_other_trees_can_be_tried(tiny_engine: Callable[..., Any]) -> None:
    info = EngineInfo.load(tiny_engine(tree=load_tree("cpu-1")).path)
    info.require_tree(load_tree("none"))
    info.require_tree(load_tree("cpu-8"))
    with pytest.raises(ConfigError, match=f"top-{MIN_TOP_K + 1}"):
        info.require_tree(Tree.from_choices([[MIN_TOP_K]]))
    with pytest.raises(TreeError, match="depth 4"):
        info.require_tree(Tree.from_choices([[0] * depth for depth in (1, 2, 3, 4)]))


@pytest.mark.parametrize("change", [{"surplus": 1}, {"top_k": None}])
def test_engine_json_of_another_version(change: dict[str, Any], tiny_engine: Callable[..., Any]) -> None:
    path = tiny_engine().path / "engine.json"
    body = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in body.items() if value is not None}))
    with pytest.raises(ConfigError, match="export again"):
        EngineInfo.load(path.parent)


def test_fp8_activations_are_in_the_exchange_graph_alone(tiny_engine: Callable[..., Any], tmp_path: Path) -> None:
    made = tiny_engine("llama", "fp8")
    write_onnx(tmp_path / "onnx", made.checkpoint, get_format("fp8"), made.scales, max_length=64)
    linears = 2 * 4  # layers; q, k and v are one, gate and up another
    exchange, engine = operators(tmp_path / "onnx" / "decoder.onnx"), operators(made.path / "decoder.onnx")
    assert (exchange["QuantizeLinear"], exchange["DequantizeLinear"]) == (linears, 2 * linears)
    assert (engine.get("QuantizeLinear", 0), engine["DequantizeLinear"]) == (0, linears)


@pytest.mark.parametrize("quant", ["none", "int8_wo"])
def test_exchange_graph_of_the_other_formats(quant: str, tiny_engine: Callable[..., Any], tmp_path: Path) -> None:
    made = tiny_engine("llama", quant)
    write_onnx(tmp_path / "onnx", made.checkpoint, get_format(quant), None, max_length=128)
    for file in ("decoder.onnx", "decoder.onnx.data"):
        assert (tmp_path / "onnx" / file).read_bytes() == (made.path / file).read_bytes()


def test_every_format_but_nvfp4_has_a_form() -> None:
    without = [name for name, weight_format in FORMATS.items() if weight_format.onnxruntime is None]
    assert without == ["nvfp4"]  # ONNX Runtime has no FP4 arithmetic on a CPU
    with pytest.raises(ConfigError, match=r"--quant nvfp4.*one of none, fp8, .*int4_awq.*pass --engine none"):
        onnx_form(FORMATS["nvfp4"])
    with pytest.raises(ConfigError, match="no ONNX form"):
        onnx_form(replace(get_format("none"), onnxruntime=None))


def test_a_draft_vocabulary_smaller_than_the_candidates(make_case: Callable[..., Any], tmp_path: Path) -> None:
    case = make_case()
    with pytest.raises(ConfigError, match=f"--draft-vocab: got 3 tokens; expected at least {MIN_TOP_K}"):
        write_engine(
            tmp_path / "engine", case.checkpoint, get_format("none"), None, tree=load_tree("cpu-1"), max_length=64,
            draft_vocab=torch.arange(3), save_tokenizer=lambda path: None, source={},
        )  # fmt: skip
