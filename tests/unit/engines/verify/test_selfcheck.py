"""What an exported engine has to pass: good ones do, in every form and family, and damaged ones do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.engines.verify.selfcheck import BOUNDS, MEASURED, TENSORRT_BOUNDS, check_engine, tree_error
from medusa_export.heads.trees.tree import Tree, load_tree
from medusa_export.quantize.format_facts import TensorRt
from medusa_export.quantize.formats import FORMATS
from medusa_export.quantize.tensorrt_targets import tensorrt_form
from tests.paths import ROOT

TEXTS = [[*range(5, 45)], [*range(90, 50, -2)], [1, 2]]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("quant", ["none", "fp8", "int8_wo"])
def test_good_engines_pass(family: str, quant: str, tiny_engine: Callable[..., Any]) -> None:
    made = tiny_engine(family, quant, **({"head_dim": 32} if family == "qwen3" else {}))
    assert check_engine(made.path, made.model_dir, TEXTS) == []


def test_every_form_has_a_bound() -> None:
    assert {row.onnxruntime.form for row in FORMATS.values() if row.onnxruntime} == BOUNDS.keys()
    assert {
        row.tensorrt.form for row in FORMATS.values() if isinstance(row.tensorrt, TensorRt)
    } == TENSORRT_BOUNDS.keys()


def test_the_bounds_of_tensorrts_forms_follow_from_what_was_measured() -> None:
    """The document's table is what `benchmarks/tensorrt_builds.py --check` printed; the worse of both dtypes is what counts."""
    text = (ROOT / "docs" / "tensorrt.md").read_text()
    table = text.split("## Numbers")[1].split("\n\n| ")[1].splitlines()[2:]
    rows: dict[str, list[list[float]]] = {}
    for line in table:
        if not line.startswith("|"):
            break
        name, _, *cells = (cell.strip(" `%") for cell in line.strip("|").split("|"))
        rows.setdefault(tensorrt_form(FORMATS[name]).form, []).append([float(cell) for cell in cells])
    assert rows.keys() == MEASURED.keys()
    for form, found in rows.items():
        error, _, _, _, kl, agreement = (
            [min, max][index < 5](row[index] for row in found)
            for index in range(6)  # more is better of the last only
        )
        assert MEASURED[form] == pytest.approx((kl, agreement / 100, error), rel=0.07, abs=1e-4), form
        assert TENSORRT_BOUNDS[form].max_kl >= 4 * kl
        assert TENSORRT_BOUNDS[form].min_agreement < agreement / 100
        assert TENSORRT_BOUNDS[form].max_tree_noise > error


@pytest.mark.parametrize("max_length", [16, 40])
def test_texts_longer_than_the_context_are_cut(max_length: int, tiny_engine: Callable[..., Any]) -> None:
    made = tiny_engine(max_length=max_length)
    assert check_engine(made.path, made.model_dir, TEXTS) == []


@pytest.mark.parametrize("texts", [[], [[]], [[3]]])
def test_nothing_to_run(texts: list[list[int]], tiny_engine: Callable[..., Any]) -> None:
    made = tiny_engine()
    assert check_engine(made.path, made.model_dir, texts) == []


def test_one_head(tiny_engine: Callable[..., Any]) -> None:
    made = tiny_engine(heads={"num_heads": 1}, tree=load_tree("cpu-1"))
    assert check_engine(made.path, made.model_dir, TEXTS) == []


def test_another_checkpoint(tiny_engine: Callable[..., Any]) -> None:
    made, other = tiny_engine(), tiny_engine(seed=1)
    (problem,) = check_engine(made.path, other.model_dir, TEXTS)
    assert problem.startswith("engine: KL")
    assert check_engine(made.path, None, TEXTS) == []


@pytest.mark.parametrize("weight", ["o_proj", "up_proj"])
def test_one_weight_off(weight: str, tiny_engine: Callable[..., Any]) -> None:
    made = tiny_engine()
    path = made.model_dir / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for name in tensors:
        if name.startswith("model.layers.1.") and name.endswith(f"{weight}.weight"):
            tensors[name] *= 1.5
    save_file(tensors, path, metadata={"format": "pt"})
    (problem,) = check_engine(made.path, made.model_dir, TEXTS)
    assert "expected at most 0.001 and at least 97%" in problem


@pytest.mark.parametrize("first", [True, False])
def test_nan_is_found_wherever_it_comes(
    first: bool, tiny_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a single step of the first or of the last path, with finite numbers beside it."""
    made, score = tiny_engine(), OnnxRuntimeEngine.score
    calls: list[None] = []

    def broken(self: OnnxRuntimeEngine, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        spoil = np.float32(np.nan if len(calls) == (1 if first else 2) else 1)
        return (block * spoil for block in score(self, *args, **kwargs))

    monkeypatch.setattr(OnnxRuntimeEngine, "score", broken)
    (problem,) = check_engine(made.path, None, [TEXTS[0]])
    assert problem.startswith("engine: tree and single steps differ by nan logits")


@pytest.mark.parametrize("broken_text", [0, 1])
def test_nan_is_found_in_any_text(
    broken_text: int, tiny_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, tree_logits = tiny_engine(), OnnxRuntimeEngine.tree_logits
    calls: list[None] = []

    def broken(self: OnnxRuntimeEngine, *args: Any) -> Any:
        calls.append(None)
        return tree_logits(self, *args) * np.float32(np.nan if len(calls) - 1 == broken_text else 1)

    monkeypatch.setattr(OnnxRuntimeEngine, "tree_logits", broken)
    assert len(check_engine(made.path, None, TEXTS[:2])) == 1


@pytest.mark.parametrize("file", ["engine.json", "tree.json", "decoder.onnx", "heads-1.onnx"])
def test_missing_file(file: str, tiny_engine: Callable[..., Any]) -> None:
    made = tiny_engine()
    (made.path / file).unlink()
    (problem,) = check_engine(made.path, made.model_dir, TEXTS)
    assert file in problem


def test_tree_that_the_heads_cannot_fill(tiny_engine: Callable[..., Any]) -> None:
    made = tiny_engine()
    (made.path / "tree.json").write_text(load_tree("medusa-63").to_json())
    (problem,) = check_engine(made.path, made.model_dir, TEXTS)
    assert "depth 4" in problem


def test_tree_error_is_noise_on_a_good_engine(tiny_engine: Callable[..., Any]) -> None:
    engine = OnnxRuntimeEngine(tiny_engine("qwen2", dtype=torch.bfloat16).path)
    error = tree_error(engine, TEXTS[0], Tree.from_choices([[0], [1], [1, 0], [1, 1], [1, 1, 0]]))
    assert error < 1e-3
    assert not math.isnan(error)
