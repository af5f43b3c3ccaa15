"""What mends TensorRT-LLM for INT4 AWQ: in a Python of its own, with a stand-in of the module."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medusa_export.engines.trtllm.build import run_build
from medusa_export.engines.trtllm.command import BuildSize
from medusa_export.engines.trtllm.scripts import AWQ_DIR, build_script, write_awq_mending, write_scripts
from medusa_export.heads.contract.trtllm_releases import find_release

LAYERS = """
class WeightOnlyGroupwiseQuantLinear: ...
class WeightOnlyGroupwiseQuantRowLinear: ...
class Other: ...
"""
ASK = (
    "import tensorrt_llm.quantization.layers as layers; "
    "print([getattr(each, 'use_int8_weight', None) for each in "
    "(layers.WeightOnlyGroupwiseQuantLinear(), layers.WeightOnlyGroupwiseQuantRowLinear(), layers.Other())])"
)
CONFIG: dict[str, Any] = {
    "model_type": "llama", "dtype": "float16", "num_medusa_heads": 1, "num_medusa_layers": 1, "max_draft_len": 3,
    "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
}  # fmt: skip


@pytest.fixture
def tensorrt_llm(tmp_path: Path) -> Path:
    """A directory with a package of that name."""
    package = tmp_path / "site" / "tensorrt_llm" / "quantization"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "layers.py").write_text(LAYERS)
    return tmp_path / "site"


def ask(*path: Path, code: str = ASK) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_attribute_is_there(tensorrt_llm: Path, tmp_path: Path) -> None:
    assert ask(tensorrt_llm) == "[None, None, None]"
    write_awq_mending(tmp_path / AWQ_DIR)
    assert ask(tmp_path / AWQ_DIR, tensorrt_llm) == "[False, False, None]"


def test_another_sitecustomize_still_runs(tensorrt_llm: Path, tmp_path: Path) -> None:
    write_awq_mending(tmp_path / AWQ_DIR)
    (tensorrt_llm / "sitecustomize.py").write_text("import sys; sys.seen = 1")
    assert ask(tmp_path / AWQ_DIR, tensorrt_llm, code="import sys; print(sys.seen)") == "1"


def test_a_process_that_spawns(tensorrt_llm: Path, tmp_path: Path) -> None:
    """As trtllm-build does with --workers."""
    write_awq_mending(tmp_path / AWQ_DIR)
    code = f"import subprocess, sys; print(subprocess.run([sys.executable, '-c', {ASK!r}], capture_output=True).stdout)"
    assert "[False, False, None]" in ask(tmp_path / AWQ_DIR, tensorrt_llm, code=code)


def test_the_build_has_it(tensorrt_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_awq_mending(tmp_path / AWQ_DIR)
    monkeypatch.setenv("PYTHONPATH", str(tensorrt_llm))
    seen = tmp_path / "seen"
    code = ASK.replace("print(", f"open({str(seen)!r}, 'w').write(str(") + ")"
    for mending, expected in ((None, "[None, None, None]"), (tmp_path / AWQ_DIR, "[False, False, None]")):
        run_build([sys.executable, "-c", code], 1, lambda done, total: None, mending)
        assert seen.read_text() == expected


@pytest.mark.parametrize("algo", ["FP8", "W4A16_AWQ", "W4A8_AWQ", None])
def test_scripts(algo: str | None, tmp_path: Path) -> None:
    config = {**CONFIG, "quantization": {"quant_algo": algo}}
    size, release = BuildSize(1, 64), find_release("1.2.1")
    write_scripts(tmp_path, config, size, release)
    needed = algo in ("W4A16_AWQ", "W4A8_AWQ")
    assert (tmp_path / AWQ_DIR / "sitecustomize.py").is_file() == needed
    lines = build_script(config, size, release).splitlines()
    calls = [line for line in lines if "trtllm-build \\" in line]
    assert [line.startswith('PYTHONPATH="$here/awq${PYTHONPATH:+:$PYTHONPATH}" ') for line in calls] == [needed, False]
    subprocess.run(["bash", "-n", str(tmp_path / "build.sh")], check=True)
