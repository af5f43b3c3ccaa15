"""Bad inputs for medusa-export: good ones to damage, and the command run on them in this process."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from medusa_export.exporter.cli import export as cli

Listing = dict[str, tuple[int, int] | None]


@dataclass
class Inputs:
    """A good checkpoint with its tokenizer, good heads for it, and an empty directory ``work`` for the output."""

    root: Path
    model: Path
    heads: Path

    @property
    def weights(self) -> Path:
        """The checkpoint's only weights file."""
        return self.model / "model.safetensors"

    @property
    def head_weights(self) -> Path:
        """The heads' only weights file."""
        return self.heads / "medusa_lm_head.safetensors"

    def flags(self, **changes: object) -> list[str]:
        """The smallest export; ``None`` drops a flag."""
        output = self.root / "work/out"
        given = {"ckpt": self.model, "heads": self.heads, "engine": "none", "output": output, **changes}
        pairs = ((f"--{name.replace('_', '-')}", value) for name, value in given.items() if value is not None)
        return [str(part) for pair in pairs for part in pair]

    def set_config(self, directory: Path | None = None, **values: object) -> None:
        """Change config.json of the model, or of another directory; ``...`` removes a key."""
        file = (directory or self.model) / "config.json"
        merged = {**json.loads(file.read_text()), **values}
        file.write_text(json.dumps({name: value for name, value in merged.items() if value is not ...}))

    def listing(self) -> Listing:
        """Every path, hidden ones and links included, and of files their size and time of change; nothing is opened."""
        found: Listing = {}
        for top, folders, files in os.walk(self.root):
            found |= dict.fromkeys((os.path.join(top, name) for name in folders), None)
            stats = {path: os.lstat(path) for path in (os.path.join(top, name) for name in files)}
            found |= {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}
        return found


@pytest.fixture
def inputs(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Callable[..., Path],
    tiny_heads: Callable[..., Path],
    tiny_tokenizer: Callable[..., Path],
) -> Inputs:
    """A copy of inputs that are written once a run; ``save_pretrained`` takes longer than most tests."""
    template = tmp_path_factory.getbasetemp() / "good-inputs"
    if not template.is_dir():
        tiny_tokenizer(tiny_checkpoint(template / "model", dtype=torch.float16))
        tiny_heads(template / "heads", dtype=torch.float16)
        (template / "work").mkdir()
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return Inputs(tmp_path, tmp_path / "model", tmp_path / "heads")


@pytest.fixture
def export(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """``export(flags) -> (exit code, stdout, stderr)`` through the entry point that the console script calls."""

    def call(flags: list[str]) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medusa-export", *flags])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.export_main()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, *capfd.readouterr()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield call
    for number, handler in before.items():
        signal.signal(number, handler)
    logging.getLogger().setLevel(logging.WARNING)


@dataclass
class Refusals:
    """Runs a command that has to fail, and checks everything about it but the words."""

    inputs: Inputs
    export: Callable[[list[str]], tuple[int, str, str]]

    def __call__(self, **changes: object) -> str:
        """The line of an export in this process, with other flags."""
        return self.check(self.export, changes)

    def alone(self, **changes: object) -> str:
        """The line of the console script in a process of its own, which has twice the memory that its libraries take."""
        return self.check(_limited, changes)

    def check(self, run: Callable[[list[str]], tuple[int, str, str]], changes: dict[str, object]) -> str:
        """The only line on stderr: nothing else happened, on the disk or elsewhere."""
        before = self.inputs.listing()
        code, out, err = run(self.inputs.flags(**changes))
        assert (code, out) == (2, ""), err
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        assert self.inputs.listing() == before  # no output, no leftovers, and no mark of code that ran
        return line


@pytest.fixture
def refused(inputs: Inputs, export: Callable[..., Any]) -> Refusals:
    """``refused(**flags) -> line``"""
    return Refusals(inputs, export)


def _limited(flags: list[str]) -> tuple[int, str, str]:
    limit = 2 << 30
    done = subprocess.run(
        [Path(sys.executable).with_name("medusa-export"), *flags],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    return done.returncode, done.stdout, done.stderr
