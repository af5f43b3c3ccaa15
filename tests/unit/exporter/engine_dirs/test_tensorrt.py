"""Engines that TensorRT-RTX really builds, ahead of time on this machine: every format, from graphs of a tiny random model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medusa_export.engines.tensorrt.build import TensorRtBuilder
from medusa_export.engines.verify.selfcheck import check_engine
from medusa_export.exporter.engine_dirs.tensorrt import write_portable, write_tensorrt_engine
from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.trees.tree import Tree
from medusa_export.quantize.format_facts import NotOffered
from medusa_export.quantize.formats import FORMATS, get_format
from medusa_export.quantize.tensorrt_targets import parse_gpus, tensorrt_form

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has wheels for Linux and Windows on x86-64 only")
TREE = Tree.from_choices([[0], [1], [0, 0]])
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}


@pytest.fixture
def write(make_case: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """``write(quant, gpus, family="llama", dtype="float16", tree) -> the directory with onnx/ and engine/``."""

    def made(
        quant: str,
        gpus: str,
        family: str = "llama",
        dtype: str = "float16",
        tree: Tree = TREE,
        max_length: int = 64,
        **config: Any,
    ) -> Path:
        case = make_case(family, layout="v2", **{**SIZES, **config})
        weight_format = get_format(quant, 64 if quant == "int4_awq" else None)
        write_portable(
            tmp_path / "onnx", case.checkpoint, weight_format, case.scales, dtype=dtype, tree=tree, max_length=max_length,
            draft_vocab=None,
        )  # fmt: skip
        write_tensorrt_engine(
            tmp_path / "engine", tmp_path / "onnx", case.checkpoint, weight_format, gpus=parse_gpus(gpus, weight_format), dtype=dtype,
            tree=tree, max_length=max_length, builder=TensorRtBuilder(), progress=steps.append_step,
            save_tokenizer=lambda path: None, source={},
        )  # fmt: skip
        return tmp_path

    return made


class Steps(list[tuple[str, int, int]]):
    def append_step(self, *step: Any) -> None:
        self.append(step)


steps = Steps()


@pytest.mark.slow
@pytest.mark.parametrize("quant", [name for name, row in FORMATS.items() if not isinstance(row.tensorrt, NotOffered)])
def test_every_format_builds(quant: str, write: Callable[..., Path]) -> None:
    out = write(quant, "sm120" if quant == "nvfp4" else "sm89,sm120" if "fp8" in quant else "sm80")
    assert check_engine(out / "engine", None, []) == []
    assert EngineInfo.load(out / "engine").form == tensorrt_form(FORMATS[quant]).form


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_every_family_builds(family: str, write: Callable[..., Path]) -> None:
    config = {"head_dim": 48, "tie_word_embeddings": True} if family == "qwen3" else {}
    out = write("none", "sm86", family, dtype="bfloat16", **config)
    assert check_engine(out / "engine", None, []) == []


def test_what_is_written(write: Callable[..., Path]) -> None:
    steps.clear()
    out = write("none", "sm89,sm120")
    names = {path.name for path in (out / "engine").iterdir()}
    assert names == {"rank0.engine", "rank0.json", "heads.engine", "heads.json", "engine.json", "tree.json"}
    body = json.loads((out / "engine" / "rank0.json").read_text())
    assert (body["gpus"], body["ahead_of_time"], body["library"]["name"]) == (["sm89", "sm120"], True, "tensorrt_rtx")
    engine = (out / "engine" / "rank0.engine").read_bytes()
    assert (body["bytes"], body["sha256"]) == (len(engine), hashlib.sha256(engine).hexdigest())
    graph = (out / "onnx" / "decoder.onnx").read_bytes()
    assert body["graph"]["decoder.onnx"] == hashlib.sha256(graph).hexdigest()
    assert body["graph"].keys() == {"decoder.onnx", "decoder.onnx.data"}
    inputs = {item["name"]: (item["dtype"], item["shape"]) for item in body["inputs"]}
    assert inputs["tree_mask"] == ("bool", [1, 1, "S", "S"])
    assert inputs["past_key_values.0.value"] == ("half", [1, 2, 64, 32])
    outputs = {item["name"]: (item["dtype"], item["shape"]) for item in body["outputs"]}
    assert outputs["present.0.value"] == inputs["past_key_values.0.value"]
    assert outputs["logits"] == ("float", [-1, 97])
    assert [profile["name"] for profile in body["profiles"]] == ["prefill", "step"]
    assert body["profiles"][0]["shapes"]["input_ids"] == [[1, 1], [1, 64], [1, 64]]
    assert body["profiles"][1]["shapes"]["output_rows"] == [[1], [4], [64]]
    heads = json.loads((out / "engine" / "heads.json").read_text())
    assert heads["outputs"] == [{"name": "draft_ids", "dtype": "int64", "shape": [2, 10]}]
    assert heads["profiles"] == []
    assert {stage for stage, _, _ in steps} == {"rank0.engine", "heads.engine"}
    assert all(0 <= done <= total for _, done, total in steps)
    assert [done == total for stage, done, total in steps if stage == "rank0.engine"][-1]


def test_a_changed_engine_is_noticed(write: Callable[..., Path]) -> None:
    out = write("none", "sm89")
    engine = out / "engine" / "heads.engine"
    engine.write_bytes(engine.read_bytes()[:-1] + b"?")
    (problem,) = check_engine(out / "engine", None, [])
    assert "heads.engine: not the engine that heads.json describes" in problem


def test_large_trees_get_room(write: Callable[..., Path]) -> None:
    wide = Tree.from_choices([[a] for a in range(12)] + [[a, b] for a in range(12) for b in range(5)])
    out = write("none", "sm89", tree=wide, max_length=128)
    body = json.loads((out / "engine" / "rank0.json").read_text())
    assert body["profiles"][1]["shapes"]["output_rows"] == [[1], [73], [73]]
    assert EngineInfo.load(out / "engine").top_k == 12


def test_weights_are_not_stored_twice(write: Callable[..., Path]) -> None:
    """The embedding's table is the tied projection's, and two profiles and two targets share all weights."""
    out = write("none", "sm89,sm120", tie_word_embeddings=True, vocab_size=20000)
    table = 2 * 20000 * SIZES["hidden_size"]
    stored = (out / "onnx" / "decoder.onnx.data").stat().st_size
    assert stored < 1.5 * table
    assert (out / "engine" / "rank0.engine").stat().st_size < stored + 0.9 * table + 8e6, "code of two targets: some MB"
    assert torch.float16.itemsize == 2
