"""Computed sizes of the portable graphs against what is written, to the byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medusa_export.exporter.engine_dirs.tensorrt import write_portable
from medusa_export.exporter.plan.spec import export_spec
from medusa_export.exporter.sizing.portable import portable_decoder_bytes, portable_heads_bytes
from medusa_export.heads.trees.tree import load_tree
from medusa_export.quantize.format_facts import NotOffered
from medusa_export.quantize.formats import FORMATS, get_format


@pytest.mark.parametrize("quant", [name for name, row in FORMATS.items() if not isinstance(row.tensorrt, NotOffered)])
@pytest.mark.parametrize(("family", "layout"), [("qwen2", "v1"), ("qwen3", "v2")])
def test_sizes(quant: str, family: str, layout: str, make_case: Callable[..., Any], tmp_path: Path) -> None:
    config = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 3000, "num_hidden_layers": 1, "head_dim": 64}
    if family == "qwen3":
        config["tie_word_embeddings"] = True
    case = make_case(family, layout, num_layers=2, **config)
    weight_format, tree, tokens = get_format(quant), load_tree("cpu-3"), torch.arange(700)
    write_portable(
        tmp_path / "onnx", case.checkpoint, weight_format, case.scales, dtype="float16", tree=tree, max_length=96, draft_vocab=tokens
    )  # fmt: skip
    spec = export_spec(
        case.checkpoint, weight_format, tree=tree, tp=1, dtype="float16", kv_cache="none", quant_heads=False, exclude=()
    )
    written = {path.name: path.stat().st_size for path in (tmp_path / "onnx").glob("*.data")}
    # a data file ends with its last tensor, not on a page
    assert 0 <= portable_decoder_bytes(spec, 96) - written["decoder.onnx.data"] < 4096
    assert 0 <= portable_heads_bytes(spec, 700, layout == "v2") - written["heads.onnx.data"] < 4096
