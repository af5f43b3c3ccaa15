"""examples/prepare_data.sh and examples/launch.sh, one after the other, on a tiny model: the workflow that people know."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(script: str, *arguments: object, code: int = 0) -> str:
    """stderr of a script that ends with ``code``."""
    done = subprocess.run(
        [EXAMPLES / script, *map(str, arguments)], capture_output=True, text=True, timeout=120, env=dict(os.environ)
    )
    assert done.returncode == code, done.stderr
    return done.stderr


def test_from_prompts_to_heads(
    tiny_checkpoint: Callable[..., Any], tiny_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_checkpoint(tmp_path / "model", "llama", head_dim=16)
    tiny_tokenizer(model)
    prompts, data = tmp_path / "prompts.jsonl", tmp_path / "data.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"w{n} w{n + 1}"}) + "\n" for n in range(12)))
    run("prepare_data.sh", "--data_path", prompts, "--output_path", data, "--model", model, "--max-tokens", 12)
    assert len(data.read_text().splitlines()) == 12

    flags = ["--model", model, "--data", data, "--mode", "medusa", "--num_epochs", 0.1, "--lr", 1e-2]
    flags += ["--save_steps", 100, "--heads", 2, "--layers", 1, "--keep-truncated"]
    joint = ["--only_medusa_heads", "False", "--batch-size", 2, "--max-steps", 3]
    run("launch.sh", *flags, "--output_dir", tmp_path / "joint", *joint)
    run("launch.sh", *flags, "--output_dir", tmp_path / "heads", "--only_medusa_heads", "True")
    assert MedusaCheckpoint.open(tmp_path / "joint", tmp_path / "joint").num_medusa_heads == 2
    assert MedusaCheckpoint.open(model, tmp_path / "heads").num_medusa_layers == 1


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
def test_wrong_flags(script: str, flags: list[str], message: str) -> None:
    assert message in run(script, *flags, code=2)
