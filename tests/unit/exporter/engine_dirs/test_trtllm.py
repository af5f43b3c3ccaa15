"""medusa-export --engine tensorrt-llm, with and without a stand-in for trtllm-build."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.engines.trtllm.build import TrtllmBuilder, next_steps
from medusa_export.engines.tuning.auto import choose_tree
from medusa_export.engines.verify.selfcheck import check_engine
from medusa_export.exporter.job.arguments import ExportArguments
from medusa_export.exporter.pipeline.export import export
from medusa_export.exporter.verify.checkpoint import verify_export
from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.contract.engine_tools import EngineTools

Export = Callable[..., Path]


@pytest.fixture
def run(
    tiny_checkpoint: Callable[..., Path],
    tiny_heads: Callable[..., Path],
    tiny_tokenizer: Callable[..., Path],
    tmp_path: Path,
) -> Export:
    def go(family: str = "llama", **flags: Any) -> Path:
        model = tiny_checkpoint(tmp_path / "model", family)
        tiny_tokenizer(model)
        heads, out = tiny_heads(tmp_path / "heads"), tmp_path / "out"
        arguments = ExportArguments(model, out, heads=heads, engine="tensorrt-llm", **{"max_length": 64, **flags})
        assert export(arguments, EngineTools(check_engine, choose_tree, TrtllmBuilder()))
        return out

    return go


def test_without_the_tool(run: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    out = run(quant="fp8_rowwise", tp=2)
    assert verify_export(out) == []
    assert not (out / "onnx").exists()
    info = EngineInfo.load(out / "engine")
    assert (info.backend, info.max_length, info.max_depth) == ("tensorrt-llm", 64, 3)
    assert (out / "engine" / "tree.json").read_text() == (out / "tree.json").read_text()
    assert {"build.sh", "run.py", "tokenizer.json", "baseline_config.json"} <= {
        p.name for p in (out / "engine").iterdir()
    }
    assert subprocess.run(["bash", "-n", out / "engine" / "build.sh"], check=False).returncode == 0
    script = (out / "engine" / "build.sh").read_text()
    assert "--workers 2" in script
    assert "--max_batch_size 4" in script
    assert "tritonserver:26.07-trtllm-python-py3" in next_steps(out)[-1]


def test_with_the_stand_in(run: Export, standin_trtllm_build: Callable[[], list[list[str]]]) -> None:
    out = run("qwen2", max_batch=8)
    assert verify_export(out) == []
    assert next_steps(out) == []
    medusa, baseline = standin_trtllm_build()
    draft = json.loads((out / "tree.json").read_text())["max_draft_len"]
    assert medusa[medusa.index("--opt_num_tokens") + 1] == str(8 * (draft + 1))
    assert "--speculative_decoding_mode" not in baseline
    built = json.loads((out / "engine" / "baseline" / "config.json").read_text())["pretrained_config"]
    assert (built["architecture"], built["qwen_type"]) == ("Qwen2ForCausalLM", "qwen2")
    assert json.loads((out / "engine" / "build.json").read_text())["tensorrt_llm"] == "1.2.1"


def test_a_failed_build_leaves_nothing(
    run: Export, standin_trtllm_build: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STANDIN_EXIT", "1")
    monkeypatch.setenv("STANDIN_LOG", "torch.OutOfMemoryError: CUDA out of memory")
    with pytest.raises(Exception, match="too little memory on the GPU"):
        run()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_length": 129}, r"--max-length: got 129; expected 2 \.\. 128"),
        ({"max_batch": 0}, "--max-batch: got 0"),
        ({"trtllm_version": "1.3.0"}, "no engine backend and so no Medusa"),
        ({"tree": "auto"}, "--engine onnxruntime"),
        ({"gpu": "sm89"}, "--gpu requires --engine tensorrt"),
    ],
)
def test_refusals(flags: dict[str, Any], message: str, run: Export, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**flags)
    assert not (tmp_path / "out").exists()


def test_another_release_is_installed(run: Export, standin_trtllm_build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medusa_export.engines.trtllm.build.importlib.metadata.version", lambda name: "1.1.0")
    with pytest.raises(ConfigError, match=r"got TensorRT-LLM 1\.1\.0; expected 1\.2\.1"):
        run()
