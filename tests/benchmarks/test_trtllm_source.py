"""The script that loads an export with NVIDIA's own classes: skipped without their source, and its stand-ins stand in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_export.engines.trtllm.scripts import write_awq_mending
from tests.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "trtllm_source.py"
SOURCE = "MEDUSA_EXPORT_TRTLLM_SOURCE"
needs_source = pytest.mark.skipif(SOURCE not in os.environ, reason=f"{SOURCE} names no source tree of TensorRT-LLM")


def run(*arguments: Path | str, **environment: str) -> tuple[int, str]:
    path = os.pathsep.join(filter(None, (environment.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_skipped_without_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SOURCE, raising=False)
    assert run("nothing") == (0, f"skipped: {SOURCE} names no source tree of TensorRT-LLM\n")


@pytest.fixture
def export(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], tiny_heads: Callable[..., Path]
) -> Callable[..., Path]:
    """``export(weight_format, scales=None, **options) -> directory``: a checkpoint whose sizes every format takes."""
    from medusa_export.exporter.write.trtllm import write_trtllm
    from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
    from medusa_export.heads.trees.tree import Tree
    from medusa_export.quantize.formats import get_format

    def write(weight_format: str, **options: Any) -> Path:
        sizes = {"hidden_size": 256, "intermediate_size": 256}
        heads = tiny_heads(tmp_path / "heads", num_heads=1, hidden=256)
        checkpoint = MedusaCheckpoint.open(tiny_checkpoint(tmp_path / "model", **sizes), heads)
        write_trtllm(
            tmp_path / "out", checkpoint, get_format(weight_format), None, tree=Tree.from_choices([[0]]), **options
        )
        return tmp_path / "out"

    return write


@needs_source
@pytest.mark.parametrize(("weight_format", "tp"), [("none", 2), ("fp8_rowwise", 1), ("int8_wo", 1)])
def test_nvidias_classes_load_it(weight_format: str, tp: int, export: Callable[..., Path]) -> None:
    code, said = run(export(weight_format, tp=tp))
    assert code == 0, said
    assert said.count('"without a value": []') == tp


@needs_source
def test_they_refuse_what_is_missing(export: Callable[..., Path]) -> None:
    out = export("none")
    text = (out / "config.json").read_text()
    (out / "config.json").write_text(text.replace('"num_medusa_heads": 1', '"num_medusa_heads": 2'))
    code, said = run(out)
    assert code == 1
    assert "Required but not provided tensors" in said


@needs_source
def test_awq_fails_until_the_class_is_mended(tmp_path: Path, export: Callable[..., Path]) -> None:
    """On a config alone: the model is built, and quantized twice, before it takes the first tensor."""
    out = export("none")
    groupwise = '"quant_algo": "W4A16_AWQ", "group_size": 64, "pre_quant_scale": true'
    text = (out / "config.json").read_text().replace('"quant_algo": null', groupwise)
    (out / "config.json").write_text(text)
    assert "has no attribute 'use_int8_weight'" in run(out)[1]
    write_awq_mending(tmp_path / "awq")
    assert "Required but not provided tensors" in run(out, PYTHONPATH=str(tmp_path / "awq"))[1]
