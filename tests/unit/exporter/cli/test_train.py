"""medusa-train as its user calls it, on a tiny model: every way of training, flags and files, interruption, wrong input."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from medusa_export.exporter.cli import train as cli_train
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.trees.followers import Followers

BIN = Path(sys.executable).parent
REPORT = {"acceptance.json", "followers.npz", "training.json", "training.svg", "logs"}


@pytest.fixture
def given(tiny_checkpoint: Callable[..., Any], tiny_tokenizer: Callable[..., Any], tmp_path: Path) -> list[str]:
    """Flags that a training needs."""
    model = tiny_checkpoint(tmp_path / "model", "llama")
    tiny_tokenizer(model)
    rng = random.Random(0)
    with (tmp_path / "data.jsonl").open("w") as file:
        for _ in range(40):
            said = [" ".join(f"w{rng.randrange(80)}" for _ in range(rng.randint(2, 12))) for _ in range(2)]
            roles = ("user", "assistant")
            messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
            file.write(json.dumps({"messages": messages, "finish_reason": "stop"}) + "\n")
    return ["--ckpt", str(model), "--data", str(tmp_path / "data.jsonl"), "--output", str(tmp_path / "out")]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["medusa-train", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli_train.train_main()
    return int(stopped.value.code or 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "files"),
    [
        ([], {"medusa_lm_head.safetensors", "config.json"}),
        (["--layout", "v1", "--distill", "0.5"], {"medusa_lm_head.safetensors", "config.json"}),
        (["--reference"], {"medusa_lm_head.safetensors", "config.json"}),
        (["--joint", "--lr", "0.01"], {"medusa_lm_head.safetensors", "config.json", "model.safetensors", "tokenizer.json"}),
        (["--quant", "int8_wo"], {"medusa_lm_head.safetensors", "config.json"}),
    ],
    ids=["fast", "v1", "reference", "joint", "quant"],
)  # fmt: skip
def test_every_way_trains(
    flags: list[str],
    files: set[str],
    given: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shape = ["--num-heads", "2", "--num-layers", "2", "--max-steps", "3"]
    assert run(monkeypatch, *given, *shape, *flags) == 0
    out = tmp_path / "out"
    assert files | REPORT <= {path.name for path in out.iterdir()}
    base = out if "model.safetensors" in files else tmp_path / "model"
    checkpoint = MedusaCheckpoint.open(base, out)
    assert (checkpoint.num_medusa_heads, checkpoint.num_medusa_layers) == (2, 2)
    assert float(checkpoint.read("medusa_heads.1.1.linear.weight").abs().max()) > 0
    found = json.loads((out / "acceptance.json").read_text())
    assert found["heads"][0]["top10"] >= found["heads"][0]["top1"]
    assert json.loads((out / "training.json").read_text())["data"]["train"]
    assert Followers.load(out / "followers.npz", checkpoint.config.vocab_size).tokens.size
    assert (out / "training.svg").read_text().rstrip().endswith("</svg>")
    assert list((out / "logs").rglob("events.out.tfevents.*"))
    printed = capfd.readouterr().out
    assert "t+3" in printed
    assert f"wrote {out}" in printed
    assert not (tmp_path / ".out.training").exists()


@pytest.fixture
def train(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Train one head for two steps: name and flags -> its directory."""

    def call(name: str, *flags: str) -> Path:
        out = tmp_path / name
        assert run(monkeypatch, *given[:-1], str(out), "--num-heads", "1", "--max-steps", "2", *flags) == 0
        return out

    return call


@pytest.mark.slow
def test_prompts_are_learnt_on_request_but_not_measured(train: Callable[..., Path]) -> None:
    directories = train("answers"), train("everything", "--learn-prompts")
    answers, everything = (json.loads((each / "training.json").read_text()) for each in directories)
    assert everything["rows"] > answers["rows"]
    assert everything["data"]["held_out"] == answers["data"]["held_out"]


@pytest.mark.slow
def test_the_heads_that_it_starts_from_keep_a_share(train: Callable[..., Path]) -> None:
    heads = "--heads", str(train("start"))
    directories = Path(heads[1]), train("trained", *heads), train("averaged", *heads, "--start-share", "0.25")
    start, trained, averaged = (load_file(each / "medusa_lm_head.safetensors") for each in directories)
    for name, tensor in averaged.items():
        expected = 0.75 * trained[name].float() + 0.25 * start[name].float()
        assert (tensor.float() - expected).abs().max() < 0.01 * (trained[name] - start[name]).float().abs().max() + 1e-6


def test_a_share_of_no_heads(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *given, "--start-share", "0.25") == 2
    assert "--start-share: got 0.25 of no heads" in " ".join(capfd.readouterr().err.split())


def test_a_file_of_flags_is_the_flags(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name.removeprefix("--") for name in given[::2]]
    flags = dict(zip(names, given[1::2], strict=True))
    config = {**flags, "data": [flags["data"]], "num-heads": 1, "max_steps": 2, "only-medusa-heads": True}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
    assert run(monkeypatch, "--config", str(tmp_path / "train.yaml"), "--output", str(tmp_path / "a")) == 0
    flags["output"] = str(tmp_path / "b")
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    assert run(monkeypatch, *words, "--num-heads", "1", "--max-steps", "2") == 0
    first, second = (load_file(tmp_path / name / "medusa_lm_head.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)


@pytest.mark.slow
def test_killed_and_continued(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 between two checkpoints; the next run takes the states and the checkpoint that are there, to the same heads."""
    flags = ["--max-steps", "150", "--batch-tokens", "16", "--checkpoint-every", "10", "--num-heads", "1"]
    process = subprocess.Popen([BIN / "medusa-train", *given, *flags], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / ".out.training").glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / ".out.training").glob("*.safetensors"))
    assert run(monkeypatch, *given, *flags) == 0
    whole = [*given[:-1], str(tmp_path / "whole")]
    assert run(monkeypatch, *whole, *flags) == 0
    first, second = (load_file(tmp_path / name / "medusa_lm_head.safetensors") for name in ("out", "whole"))
    assert all((first[name] == second[name]).all() for name in first)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora-rank", "4"], "--lora-rank: got 4; expected none: --lora-rank requires --joint; leave"),
        (["--batch-size", "4"], "--batch-size requires --reference, --joint or --quant"),
        (["--reference", "--distill", "1"], "--distill requires training without --reference, --joint and --quant"),
        (["--joint", "--cache", "x"], "--cache: got x"),
        (["--fsdp"], "--fsdp: got True"),
        (["--target", "onnx"], "--target requires --quant"),
        (["--layout", "modelopt"], "--layout: got modelopt"),
        (["--epochs", "0"], "epochs: got 0.0"),
        (["--num-heads", "0"], "--num-heads: got 0"),
        (["--max-length", "99999"], "the model's positions"),
        (["--held-out", "1"], "--held-out: got 1.0"),
        (["--heads", "nowhere"], "nowhere: got no such file"),
        (["--quant", "nvfp4"], "rounds on GPUs only"),
        (["--config", "nowhere.yaml"], "no such file"),
        (["--eval-data", "nowhere.jsonl"], "nowhere.jsonl: got no readable file"),
    ],
)
def test_wrong_flags(
    flags: list[str],
    message: str,
    given: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *given, *flags) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_unknown_key_of_a_file(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.yaml").write_text("epoch: 3\n")
    assert run(monkeypatch, *given, "--config", str(tmp_path / "train.yaml")) == 2
    assert "train.yaml: got the key epoch" in capfd.readouterr().err
