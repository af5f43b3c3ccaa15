"""medusa-data as its user calls it: a model run here, a server, what was made before, wrong flags and wrong lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.exporter.cli import data as cli_data
from medusa_export.heads.checkpoint.medusa_checkpoint import load_reference
from medusa_export.heads.decoding.reference import greedy

PROMPTS = [{"prompt": "w1 w2"}, {"messages": [{"role": "user", "content": "w3"}]}, {"prompt": "w4 w5 w6"}]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Exit code of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["medusa-data", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli_data.data_main()
    return int(stopped.value.code or 0)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path], tiny_tokenizer: Callable[..., Path], tmp_path: Path) -> Path:
    return tiny_tokenizer(tiny_checkpoint(tmp_path / "model"))


@pytest.mark.slow
def test_a_model_run_here_writes_what_it_says_greedily(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "data.jsonl"
    flags = ["--prompts", prompts, "--model", model, "--output", out, "--max-tokens", "6", "--max-length", "64"]
    assert run(monkeypatch, *flags) == 0
    made = rows(out)
    assert "3 rows (0 made before)" in capfd.readouterr().out
    assert [row["messages"][0]["content"] for row in made] == ["w1 w2", "w3", "w4 w5 w6"]
    assert made[0]["sampling"]["temperature"] == 0
    assert made[0]["model"]

    tokenizer, reference = read_tokenizer(model), load_reference(model, torch.float32)
    for row in made:
        ids = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=True)
        expected = greedy(reference, ids["input_ids"], max_new_tokens=6, eos_token_ids=(2,))
        assert row["messages"][1]["content"] == tokenizer.decode(expected, skip_special_tokens=True)
        assert row["finish_reason"] == ("stop" if expected[-1] == 2 else "length")

    assert run(monkeypatch, *flags) == 0
    assert "3 rows (3 made before)" in capfd.readouterr().out
    assert rows(out) == made


def test_a_server(
    fake_server: Callable[..., Any],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    server, out = fake_server(), tmp_path / "data.jsonl"
    assert run(monkeypatch, "--prompts", prompts, "--server", server.url, "--output", out, "--temperature", "0.5") == 0
    assert len(rows(out)) == len(server.requests) == 3
    assert {request["temperature"] for request in server.requests} == {0.5}


def test_conversations_that_fail_end_with_1_and_the_rest_is_kept(
    fake_server: Callable[..., Any],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    server, out = fake_server(), tmp_path / "data.jsonl"
    server.faults = [400]
    flags = ["--prompts", prompts, "--server", server.url, "--output", out, "--concurrency", "1", "--retries", "0"]
    assert run(monkeypatch, *flags) == 1
    assert "1 of 3 conversations failed" in capfd.readouterr().err
    assert len(rows(out)) == 2
    assert run(monkeypatch, *flags) == 0
    assert "3 rows (2 made before)" in capfd.readouterr().out


def test_bad_lines_end_the_run_or_are_skipped(
    fake_server: Callable[..., Any],
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    server, out = fake_server(), tmp_path / "data.jsonl"
    prompts.write_text(prompts.read_text() + '{"nothing": 1}\n')
    flags = ["--prompts", prompts, "--server", server.url, "--output", out]
    assert run(monkeypatch, *flags) == 2
    assert "prompts.jsonl:4: got" in capfd.readouterr().err
    assert not out.exists()
    assert not server.requests
    assert run(monkeypatch, *flags, "--skip-bad-lines") == 0
    assert "bad lines skipped: 1" in capfd.readouterr().err
    assert len(rows(out)) == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--model"),
        (["--model", "m", "--timeout", "3"], "--timeout"),
        (["--server", "http://localhost:1", "--max-batch", "2"], "--max-batch"),
        (["--model", "m", "--workers", "2"], "--workers"),
        (["--model", "m", "--executor", "spark"], "--executor"),
        (["--model", "m", "--max-batch", "0"], "1 or more"),
        (["--model", "missing-directory"], "missing-directory"),
    ],
)
def test_flags_that_cannot_be_meant(
    flags: list[str],
    said: str,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "--prompts", prompts, "--output", tmp_path / "out.jsonl", *flags) == 2
    assert said in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]
