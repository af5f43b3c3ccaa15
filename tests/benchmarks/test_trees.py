"""The tree benchmark on a tiny engine: every size is run, and the chosen tree is among them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.text.prompts import load_prompts
from medusa_export.engines.tuning.auto import choose_tree

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "trees.py"


def test_small(tiny_engine: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("trees_benchmark", BENCHMARK)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    engine = tiny_engine(drafts_well=True, heads={"num_heads": 4}, max_length=256, max_position_embeddings=256).path
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"w{n} w{n + 1}"}) + "\n" for n in range(3)))
    choose_tree(engine, load_prompts(prompts))
    chosen = json.loads((engine / "tree.json").read_text())
    figures = tmp_path / "figures.json"
    module.main(engine, prompts, max_nodes=6, max_new_tokens=12, json_file=figures)
    body = json.loads(figures.read_text())
    sizes = [len(row["tree"]) for row in body["rows"]]
    assert sizes[:3] == [1, 2, 3]
    assert 63 in sizes  # the fixed tree
    assert chosen["medusa_choices"] in [row["tree"] for row in body["rows"]] or not chosen["medusa_choices"]
    assert all(row["tokens_per_step"] >= 1 for row in body["rows"])
    assert "of the best" in capsys.readouterr().out
