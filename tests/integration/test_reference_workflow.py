"""examples/prepare_data.sh and examples/launch.sh hand the flags that people know on; tests/examples runs them for real."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.command_lines import unknown_words
from tests.paths import ROOT

STANDIN = """#!/bin/sh
printf '%s' "${0##*/}"; printf ' %s' "$@"; echo
"""


def run(tmp_path: Path, script: str, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """A script that ends with ``code``, beside commands that say what they were given."""
    examples, tools = tmp_path / "copy" / "examples", tmp_path / "bin"
    for folder in (examples, tools):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "examples" / script, examples)  # away from the checkout's own environment, which it would prefer
    for name in ("medusa-data", "medusa-train", "torchrun", "vllm"):
        (tools / name).write_text(STANDIN)
        (tools / name).chmod(0o755)
    done = subprocess.run(
        [examples / script, *map(str, arguments)], capture_output=True, text=True, timeout=60,
        env={"PATH": f"{tools}:/usr/bin:/bin", **{name: os.environ[name] for name in ("HOME",) if name in os.environ}},
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.parametrize(
    ("script", "given", "handed_on"),
    [
        ("prepare_data.sh", "--data_path p --output_path d --model m --max-tokens 12",
         "medusa-data --model m --prompts p --output d --max-tokens 12"),
        ("prepare_data.sh", "--data_path p --output_path d --served m",
         "medusa-data --server http://127.0.0.1:8000 --model m --prompts p --output d"),
        ("prepare_data.sh", "--model m --server True", "vllm serve m --host 127.0.0.1 --port 8000"),
        ("launch.sh", "--model m --data d --output_dir o --mode medusa --num_epochs 2 --lr 1e-4 --save_steps 9 --heads 3 --layers 1",
         "medusa-train --ckpt m --data d --output o --epochs 2 --lr 1e-4 --checkpoint-every 9 --num-heads 3 --num-layers 1"),
        ("launch.sh", "--model m --data d --keep-truncated --output_dir o --only_medusa_heads False --bf16 --quant fp8",
         "medusa-train --ckpt m --data d --keep-truncated --output o --bf16 --quant fp8 --joint"),
    ],
)  # fmt: skip
def test_flags(script: str, given: str, handed_on: str, tmp_path: Path) -> None:
    if shutil.which("nvidia-smi") and "--joint" in handed_on:
        pytest.skip("several GPUs would start torchrun")
    assert run(tmp_path, script, *given.split()).stdout.strip() == handed_on
    if handed_on.startswith("medusa-"):
        assert unknown_words(handed_on) == []


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("launch.sh", ["--mode", "eagle"], "--mode: got eagle"),
        ("launch.sh", ["--only_medusa_heads", "maybe"], "--only_medusa_heads: got maybe"),
        ("launch.sh", ["--lr"], "--lr: got no value"),
        ("prepare_data.sh", ["--server", "True"], "--model: got nothing"),
        ("prepare_data.sh", ["--server", "2"], "--server: got 2"),
    ],
)
def test_wrong_flags(script: str, flags: list[str], message: str, tmp_path: Path) -> None:
    assert message in run(tmp_path, script, *flags, code=2).stderr
