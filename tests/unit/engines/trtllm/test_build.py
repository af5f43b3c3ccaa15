"""The contract with ``trtllm-build``, which is not here: a stand-in executable records what it is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.engines.trtllm.build import (
    BUILD_FILE,
    TrtllmBuilder,
    build_engines,
    find_tool,
    next_steps,
    run_build,
)
from medusa_export.engines.trtllm.command import BuildSize, build_command, plain_config
from medusa_export.engines.trtllm.failures import FAILURES, BuildError, explain
from medusa_export.engines.trtllm.scripts import docker_command, write_scripts
from medusa_export.heads.contract.trtllm_releases import find_release

RELEASE = find_release("1.2.1")
SIZE = BuildSize(max_batch_size=4, max_seq_len=2048)
CONFIG: dict[str, Any] = {
    "architecture": "MedusaForCausalLM", "model_type": "llama", "dtype": "bfloat16", "num_medusa_heads": 4,
    "num_medusa_layers": 1, "max_draft_len": 63, "mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
}  # fmt: skip


def flags(command: list[str]) -> dict[str, str]:
    return dict(zip(command[1::2], command[2::2], strict=True))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint with nothing in it; the stand-in builds nothing."""
    path = tmp_path / "out" / "trtllm"
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    for rank in range(2):
        (path / f"rank{rank}.safetensors").write_bytes(b"")
    return path


@pytest.fixture
def engine_dir(checkpoint: Path) -> Path:
    path = checkpoint.parent / "engine"
    path.mkdir()
    return path


def build(checkpoint: Path, engine_dir: Path, progress: Callable[[str, int, int], None] = lambda *_: None) -> Any:
    return build_engines(checkpoint, engine_dir, SIZE, RELEASE, progress)


def test_command() -> None:
    command = build_command(CONFIG, SIZE, checkpoint="C", output="E")
    assert command[0] == "trtllm-build"
    assert flags(command) == {
        "--checkpoint_dir": "C",
        "--output_dir": "E",
        "--speculative_decoding_mode": "medusa",
        "--max_batch_size": "4",
        "--max_beam_width": "1",
        "--max_input_len": "2047",
        "--max_seq_len": "2048",
        "--max_num_tokens": "2048",  # a whole prompt; 4 trees of 64 nodes are fewer
        "--opt_num_tokens": "256",
        "--kv_cache_type": "paged",
        "--remove_input_padding": "enable",
        "--gpt_attention_plugin": "bfloat16",
        "--gemm_plugin": "bfloat16",
        "--use_paged_context_fmha": "enable",
        "--workers": "2",
        "--log_level": "info",
    }


def test_many_trees_are_longer_than_a_prompt() -> None:
    asked = flags(build_command(CONFIG, BuildSize(64, 2048), checkpoint="C", output="E"))
    assert asked["--max_num_tokens"] == asked["--opt_num_tokens"] == "4096"


def test_int8_cache_has_no_paged_context_fmha() -> None:
    config = {**CONFIG, "quantization": {"quant_algo": None, "kv_cache_quant_algo": "INT8"}}
    assert flags(build_command(config, SIZE, checkpoint="C", output="E"))["--use_paged_context_fmha"] == "disable"


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [("llama", "LlamaForCausalLM"), ("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")],
)
def test_baseline_is_the_same_model_without_medusa(model_type: str, architecture: str) -> None:
    plain = plain_config({**CONFIG, "model_type": model_type})
    assert plain["architecture"] == architecture
    assert CONFIG.keys() - plain.keys() == {"num_medusa_heads", "num_medusa_layers", "max_draft_len"}
    asked = flags(build_command(CONFIG, SIZE, checkpoint="C", output="E", medusa=False))
    assert "--speculative_decoding_mode" not in asked
    assert asked["--opt_num_tokens"] == "4"


@pytest.mark.parametrize("size", [(0, 2048), (4, 1)])
def test_sizes_that_are_none(size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="or more"):
        BuildSize(*size)


def test_builds_both_engines(
    checkpoint: Path, engine_dir: Path, standin_trtllm_build: Callable[[], list[list[str]]]
) -> None:
    seen: list[tuple[str, int, int]] = []
    record = build(checkpoint, engine_dir, lambda *at: seen.append(at))
    medusa, baseline = (flags(["", *arguments]) for arguments in standin_trtllm_build())
    assert medusa["--checkpoint_dir"] == str(checkpoint)
    assert medusa["--output_dir"] == str(engine_dir / "medusa")
    assert baseline["--output_dir"] == str(engine_dir / "baseline")
    assert "--speculative_decoding_mode" not in baseline
    assert not Path(baseline["--checkpoint_dir"]).exists()
    built = json.loads((engine_dir / "baseline" / "config.json").read_text())
    assert built["pretrained_config"]["architecture"] == "LlamaForCausalLM"
    assert seen[0] == ("trtllm-build medusa", 0, 6)
    assert [at for at in seen if at[1] == at[2]][-1] == ("trtllm-build baseline", 6, 6)
    assert json.loads((engine_dir / BUILD_FILE).read_text()) == record
    assert record["tensorrt_llm"] == "1.2.1"
    assert record["medusa"]["bytes"] == 18
    assert str(checkpoint) not in json.dumps(record)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("STANDIN_VERSION", "1.1.0", "got TensorRT-LLM 1.1.0; expected 1.2.1; pass --trtllm-version 1.1.0"),
        ("STANDIN_VERSION", "1.3.0", "no engine backend and so no Medusa"),
        ("STANDIN_FORGETS", "rank1.engine", "no rank1.engine; expected a whole engine"),
        ("STANDIN_EXIT", "1", "an error that is not in the table: .*a stand-in"),
        ("STANDIN_EXIT", "137", "killed, most likely for want of memory"),
    ],
)
def test_not_what_was_asked_for(
    variable: str, value: str, message: str, checkpoint: Path, engine_dir: Path, standin_trtllm_build: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(variable, value)
    with pytest.raises((BuildError, ConfigError), match=message):
        build(checkpoint, engine_dir)
    assert not (engine_dir / BUILD_FILE).exists()


def test_no_medusa_mode_is_found(
    checkpoint: Path, engine_dir: Path, standin_trtllm_build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medusa_export.engines.trtllm.build.MEDUSA_MODE", 32)
    with pytest.raises(BuildError, match="speculative_decoding_mode 4; expected 32"):
        build(checkpoint, engine_dir)


def test_not_installed(checkpoint: Path, engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_tool(RELEASE) is None
    TrtllmBuilder().build(checkpoint, engine_dir, lambda *_: None, max_batch=4, max_length=2048, release=RELEASE)
    assert sorted(path.name for path in engine_dir.iterdir()) == ["baseline_config.json", "build.sh", "run.py"]
    with pytest.raises(ConfigError, match=r"run build.sh in nvcr.io/nvidia/tritonserver:26.07"):
        build(checkpoint, engine_dir)


def test_another_release_is_installed(standin_trtllm_build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"tensorrt_llm": "1.0.0"}[name])
    with pytest.raises(ConfigError, match=r"installed trtllm-build: got TensorRT-LLM 1\.0\.0; expected 1\.2\.1"):
        find_tool(RELEASE)


LOGS = {
    "RuntimeError: Required but not provided tensors:{'medusa_heads.0.medusa_layers.0.linear.weights_scaling_factor'}":
        "tensors that the checkpoint lacks: .*weights_scaling_factor.*medusa-export verify",
    "AttributeError: 'WeightOnlyGroupwiseQuantLinear' object has no attribute 'use_int8_weight'": "AWQ layers .*build.sh",
    "AttributeError: 'tuple' object has no attribute 'rank'": "row-wise FP8 norm .*export again",
    "AssertionError: The value updated is not the same shape as the original. Updated: (8, 4), original: (4, 4)":
        "another shape: Updated",
    "TypeError: QuantConfig.__init__() got an unexpected keyword argument 'quantized_layers'": "does not know: quantized_layers",
    "AttributeError: can't set attribute 'kv_dtype'": "may not be there: kv_dtype",
    "AssertionError: Unsupported model architecture: MedusaForCausalLM": "no longer has the model MedusaForCausalLM; .*0.17 to 1.2.1",
    "trtllm-build: error: unrecognized arguments: --kv_cache_type paged": "does not have: --kv_cache_type",
    "trtllm-build: error: argument --gemm_plugin: invalid choice: 'bf16'": "refuses: --gemm_plugin",
    "RuntimeError: Both num_medusa_heads and max_draft_len have to be provided for Medusa model": "without num_medusa_heads",
    "RuntimeError: Gather context logits is not support with draft len > 0. If want": "leave --gather_context_logits out",
    "RuntimeError: INT8/INT4 weight-only is not supported on SM 100": "does not run: .*SM 100.*medusa-export plan",
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB": "too little memory on the GPU; .*--max-batch",
    "[E] [defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)": "too little memory",
    "RuntimeError: CUDA error: no kernel image is available for execution on the device": "no GPU that this build",
    "RuntimeError: Found no NVIDIA driver on your system.": "docker run --gpus all",
    "ImportError: libnvinfer.so.10: cannot open shared object file": "a library that is not there: libnvinfer.so.10",
    "ModuleNotFoundError: No module named 'mpi4py'": "a package that is not there: mpi4py",
    "OSError: [Errno 28] No space left on device": "a full disk",
    "[TRT] [E] 10: Could not find any implementation for node {ForeignNode[a]}": "could not build the network: .*ForeignNode",
    "Traceback:\n  ...\nValueError: something new": "not in the table: ValueError: something new; .*read the log",
}  # fmt: skip


@pytest.mark.parametrize("log", LOGS)
def test_known_failures(log: str) -> None:
    noise = (
        "[TRT-LLM] [I] Set gemm_plugin to bfloat16.\n[TRT-LLM] [W] Implicitly setting MedusaConfig.model_type = llama\n"
    )
    error = explain(noise + log + "\n", 1, ["trtllm-build"], "/tmp/x.log")
    with pytest.raises(BuildError, match=LOGS[log]):
        raise error
    assert "\n" not in str(error)


def test_every_failure_has_an_example() -> None:
    matched = {next((f.pattern for f in FAILURES if explain_with(f, log)), None) for log in LOGS}
    assert {failure.pattern for failure in FAILURES} <= matched


def explain_with(failure: Any, log: str) -> bool:
    import re

    return re.search(failure.pattern, log) is not None


def test_the_log_is_kept(
    tmp_path: Path, standin_trtllm_build: Any, monkeypatch: pytest.MonkeyPatch, checkpoint: Path
) -> None:
    monkeypatch.setenv("STANDIN_EXIT", "3")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(BuildError) as caught:
        run_build(build_command(CONFIG, SIZE, checkpoint=checkpoint, output=tmp_path / "e"), 1, lambda *_: None)
    (log,) = tmp_path.glob("trtllm-build-*.log")
    assert str(log) in str(caught.value)
    assert "a stand-in" in log.read_text()


def test_an_interrupt_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of its workers either, one of which does not listen."""
    monkeypatch.setattr("medusa_export.engines.trtllm.build.TERM_SECONDS", 0.3)
    pids = tmp_path / "pids"
    worker = f"trap '' TERM; echo $$ >> {pids}; while :; do sleep 0.05; done"
    script = f'sh -c "{worker.replace("$", chr(92) + "$")}" & echo $$ >> {pids}; echo "Weights loaded"; wait'

    def interrupt(done: int, total: int) -> None:
        while done and len(pids.read_text().split()) < 2:
            time.sleep(0.01)
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_build(["sh", "-c", script], 1, interrupt)
    deadline = time.monotonic() + 10  # the worker is reaped by init
    alive = [int(pid) for pid in pids.read_text().split()]
    assert len(alive) == 2
    while alive and time.monotonic() < deadline:
        alive = [pid for pid in alive if _runs(pid)]
    assert alive == []


def _runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False


class TestScript:
    @pytest.fixture
    def out(self, checkpoint: Path, engine_dir: Path) -> Path:
        (engine_dir / "engine.json").write_text(json.dumps({"source": {"tensorrt_llm": "1.2.1"}}))
        write_scripts(engine_dir, CONFIG, SIZE, RELEASE)
        return checkpoint.parent

    def run(self, out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(out / "engine" / "build.sh"), *arguments], capture_output=True, text=True, check=False,
            env={**os.environ, **environment},
        )  # fmt: skip

    def test_asks_for_the_same_as_the_command(
        self, out: Path, checkpoint: Path, standin_trtllm_build: Callable[[], list[list[str]]]
    ) -> None:
        result = self.run(out)
        assert result.returncode == 0, result.stderr
        medusa, baseline = (flags(["", *arguments]) for arguments in standin_trtllm_build())
        expected = flags(build_command(CONFIG, SIZE, checkpoint=checkpoint, output=""))
        assert medusa | {"--output_dir": ""} == expected
        expected = flags(build_command(CONFIG, SIZE, checkpoint="", output="", medusa=False))
        assert baseline | {"--output_dir": "", "--checkpoint_dir": ""} == expected
        engine = out.with_name("out-engine")
        assert sorted(path.name for path in engine.iterdir()) == [
            "baseline", "build.sh", "engine.json", "medusa", "run.py",
        ]  # fmt: skip
        built = json.loads((engine / "baseline" / "config.json").read_text())["pretrained_config"]
        assert built == plain_config(CONFIG)
        assert not list(out.parent.glob("*.partial"))
        again = self.run(out)
        assert (again.returncode, "is there already" in again.stderr) == (2, True)

    def test_more_flags(self, out: Path, standin_trtllm_build: Callable[[], list[list[str]]], tmp_path: Path) -> None:
        result = self.run(out, str(tmp_path / "mine"), EXTRA_FLAGS="--timing_cache t")
        assert result.returncode == 0, result.stderr
        assert all(arguments[-2:] == ["--timing_cache", "t"] for arguments in standin_trtllm_build())

    def test_a_failure_leaves_nothing(self, out: Path, standin_trtllm_build: Any) -> None:
        assert self.run(out, STANDIN_EXIT="1").returncode == 1
        assert sorted(path.name for path in out.parent.glob("out*")) == ["out"]

    def test_without_the_tool(self, out: Path) -> None:
        result = self.run(out, PATH="/usr/bin:/bin")
        assert result.returncode == 2
        assert "no trtllm-build; run this in nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3" in result.stderr

    def test_with_another_release(self, out: Path, standin_trtllm_build: Any, tmp_path: Path) -> None:
        python = tmp_path / "standin-bin" / "python3"
        python.write_text("#!/bin/sh\necho 1.1.0\n")
        python.chmod(0o755)
        result = self.run(out)
        assert result.returncode == 2
        assert "got TensorRT-LLM 1.1.0; expected 1.2.1" in result.stderr

    def test_next_steps(self, out: Path) -> None:
        steps = next_steps(out)
        assert f"  bash {out}/engine/build.sh" in steps
        assert docker_command(out, RELEASE) in steps[-1]
        (out / "engine" / BUILD_FILE).write_text("{}")
        assert next_steps(out) == next_steps(out / "nowhere") == []

    def test_docker_command(self, out: Path) -> None:
        command = docker_command(out, RELEASE)
        assert command.endswith("tritonserver:26.07-trtllm-python-py3 bash out/engine/build.sh")
        assert f"-v {out.parent}:{out.parent} -w {out.parent} " in command
