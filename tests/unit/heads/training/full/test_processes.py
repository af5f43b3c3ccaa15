"""The reference training on two processes."""

from __future__ import annotations

import json
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


def on_two(*arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the program under torchrun, whose processes do not outlive the test."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    process = subprocess.Popen(
        [sys.executable, *launcher, str(PROGRAM), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=120)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, errors


def outputs(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors") | load_file(path / "medusa_lm_head.safetensors")


@pytest.mark.slow
def test_two_processes_are_one(model: Path, tmp_path: Path) -> None:
    """The same sequences in a step, on one process and on two, copies (DDP) or shards (FSDP2): the same loss and weights."""
    sgd = '"warmup_heads": 0.25, "trainer": {"optim": "sgd"}, "learning_rate": 0.1, "max_grad_norm": 0, "max_steps": 4'
    _, losses = here(model, tmp_path / "one", f'{{"batch_size": 4, {sgd}}}')
    status, out, errors = on_two(model, tmp_path / "two", f'{{"batch_size": 2, {sgd}}}')
    assert status == 0, errors
    assert len(losses) == 3
    printed = [json.loads(line)[1] for line in out.splitlines()]
    assert len(printed) == 4  # two trainings by two processes
    assert all(found == pytest.approx(losses, rel=1e-5) for found in printed)
    first, original = outputs(tmp_path / "one"), load_file(model / "model.safetensors")
    for second in (outputs(tmp_path / "two"), outputs(tmp_path / "two-sharded")):
        for name, tensor in first.items():
            step = float((tensor - original.get(name, torch.zeros(()))).abs().max())
            assert float((second[name] - tensor).abs().max()) <= 1e-3 * step, name
