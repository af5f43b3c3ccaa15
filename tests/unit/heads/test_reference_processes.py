"""The reference training when it is killed, and on two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

# A program of its own, run three ways: in this process, until it kills itself, and by torchrun.
PROGRAM = """
import json, os, random, signal, sys
from pathlib import Path
from medusa_export.heads.reference_arguments import ReferenceArguments
from medusa_export.heads.reference_training import train_reference
from medusa_export.heads.training_data import Example

def main(model, out, options, kill=""):
    rng, data = random.Random(0), []
    for _ in range(26):
        prompt, answer = rng.randint(3, 8), rng.randint(1, 20)
        ids = [rng.randrange(97) for _ in range(prompt + answer)]
        data.append(Example(ids, [False] * prompt + [True] * answer))

    def progress(stage, done, total):
        if f"{stage}{done}" == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    common = dict(base="joint", heads=2, lora_rank=4, log_every=1, report_to=(), max_steps=9, checkpoint_every=2)
    arguments = ReferenceArguments(**common | json.loads(options))
    report = train_reference(Path(model), data[:22], Path(out), arguments, held_out=data[22:], progress=progress)
    return [report.metrics, [entry["loss"] for entry in report.history.get("joint", ()) if "loss" in entry]]

if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
"""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Iterator[Path]:
    """A model, and one thread: results are compared bit by bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tiny_checkpoint(tmp_path / "model")
    torch.set_num_threads(threads)


def here(*arguments: object) -> Any:
    """What the program's main returns in this process."""
    names: dict[str, Any] = {"__name__": "program"}
    exec(PROGRAM, names)
    return names["main"](*map(str, arguments))


def apart(script: Path, *arguments: object, launcher: tuple[str, ...] = ()) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the program in processes of its own, which do not outlive the test."""
    script.write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, *launcher, str(script), *map(str, arguments)],
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


def test_killed_and_continued(model: Path, tmp_path: Path) -> None:
    """Killed in the second stage, between two checkpoints and behind an evaluation: the same bits come out."""
    options = '{"batch_size": 4, "warmup_heads": 0.3, "patience": 9}'
    status, _, errors = apart(tmp_path / "program.py", model, tmp_path / "killed", options, "joint5")
    assert status == -signal.SIGKILL, errors
    assert not (tmp_path / "killed").exists()
    checkpoints = (tmp_path / ".killed.training" / "joint").iterdir()
    assert sorted(path.name for path in checkpoints) == ["checkpoint-2", "checkpoint-4"]
    continued, whole = (here(model, tmp_path / name, options) for name in ("killed", "whole"))
    assert continued == whole
    first, second = outputs(tmp_path / "killed"), outputs(tmp_path / "whole")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_are_one(model: Path, tmp_path: Path) -> None:
    """The same sequences in a step, on one process and on two: the same loss, and the same weights."""
    sgd = '"warmup_heads": 0, "trainer": {"optim": "sgd"}, "learning_rate": 0.1, "max_grad_norm": 0, "max_steps": 3'
    _, losses = here(model, tmp_path / "one", f'{{"batch_size": 4, {sgd}}}')
    status, out, errors = apart(
        tmp_path / "program.py", model, tmp_path / "two", f'{{"batch_size": 2, {sgd}}}', launcher=TORCHRUN
    )
    assert status == 0, errors
    assert len(losses) == 3
    printed = [json.loads(line)[1] for line in out.splitlines()]  # by both; only the first is sure to know the history
    assert max(printed, key=len) == pytest.approx(losses, rel=1e-5)
    first, second = outputs(tmp_path / "one"), outputs(tmp_path / "two")
    original = load_file(model / "model.safetensors")
    for name, tensor in first.items():
        step = float((tensor - original.get(name, torch.zeros(()))).abs().max())
        assert float((second[name] - tensor).abs().max()) <= 1e-3 * step, name
