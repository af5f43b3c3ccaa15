"""The reference training when it is killed."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

PROGRAM = Path(__file__).with_name("training_program.py")


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Iterator[Path]:
    """A model, and one thread: results are compared bit by bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tiny_checkpoint(tmp_path / "model")
    torch.set_num_threads(threads)


def here(*arguments: object) -> Any:
    """What the program's main returns in this process."""
    return runpy.run_path(str(PROGRAM))["main"](*map(str, arguments))


def outputs(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors") | load_file(path / "medusa_lm_head.safetensors")


@pytest.mark.slow
def test_killed_and_continued(model: Path, tmp_path: Path) -> None:
    """Killed in the second stage, between two checkpoints and behind an evaluation: the same bits come out."""
    options = '{"batch_size": 4, "warmup_heads": 0.3, "patience": 9}'
    command = [sys.executable, str(PROGRAM), str(model), str(tmp_path / "killed"), options, "joint5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed").exists()
    checkpoints = (tmp_path / ".killed.training" / "joint").iterdir()
    assert sorted(path.name for path in checkpoints) == ["checkpoint-2", "checkpoint-4"]
    continued, whole = (here(model, tmp_path / name, options) for name in ("killed", "whole"))
    assert continued == whole
    first, second = outputs(tmp_path / "killed"), outputs(tmp_path / "whole")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
