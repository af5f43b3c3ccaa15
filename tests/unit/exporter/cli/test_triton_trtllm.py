"""medusa-triton on an engine directory for TensorRT-LLM; the engine in it is a stand-in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.artifacts.manifest import read_manifest
from medusa_export.exporter.cli.triton import triton_main
from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.trees.tree import Tree


@pytest.fixture
def engine_dir(tmp_path: Path, tiny_tokenizer: Callable[..., Path]) -> Path:
    path = tmp_path / "engine"
    (path / "medusa").mkdir(parents=True)
    pretrained = {"mapping": {"tp_size": 1}, "max_draft_len": 1, "num_medusa_heads": 2}
    config = {"version": "1.1.0", "pretrained_config": pretrained, "build_config": {"max_batch_size": 4}}
    (path / "medusa" / "config.json").write_text(json.dumps(config))
    (path / "medusa" / "rank0.engine").write_text("a stand-in: no engine")
    EngineInfo(
        backend="tensorrt-llm", form="fp8", precision="FP8", max_length=512, max_depth=2, top_k=16, num_hidden_layers=1,
        num_key_value_heads=2, head_dim=16, hidden_size=64, vocab_size=97, eos_token_ids=(2,), session_options={},
        heads_session_options={}, source={},
    ).save(path)  # fmt: skip
    (path / "tree.json").write_text(Tree.from_choices([[0]]).to_json())
    return tiny_tokenizer(path)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["medusa-triton", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        triton_main()
    return int(caught.value.code or 0)


def test_writes_and_verifies(
    engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = tmp_path / "repository"
    flags = ("--kv-fraction", 0.5, "--no-decoupled", "--max-queue", 7)
    assert run(monkeypatch, "--engine", engine_dir, "--output", repository, *flags) == 0
    assert run(monkeypatch, "verify", repository) == 0
    assert f"{repository}: complete and consistent" in capsys.readouterr().out
    text = (repository / "tensorrt_llm" / "config.pbtxt").read_text()
    assert "max_queue_size: 7" in text
    assert "decoupled: true" not in text
    assert "25.12-trtllm-python-py3" in (repository / "compose.yaml").read_text()
    (repository / "launch.sh").write_text("echo")
    assert run(monkeypatch, "verify", repository) == 1


def test_flags_of_another_kind(
    engine_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--engine", engine_dir, "--output", tmp_path / "out", "--threads", 2) == 2
    assert "--threads requires an ONNX Runtime or TensorRT engine; leave --threads out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_export_is_as_good_as_its_engine(
    engine_dir: Path, tiny_engine: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports = {"tensorrt-llm": engine_dir.parent, "python": tiny_engine().path.parent}
    for kind, export in exports.items():
        repository = tmp_path / f"repository-{kind}"
        assert run(monkeypatch, "--engine", export, "--output", repository) == 0
        assert read_manifest(repository)["arguments"]["kind"] == kind
