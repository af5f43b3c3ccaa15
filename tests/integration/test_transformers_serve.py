"""medusa-data against a server that other people wrote, ``transformers serve``, started and asked by examples/prepare_data.sh too."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BIN = Path(sys.executable).parent
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "prepare_data.sh"
START_SECONDS = 90.0


@contextmanager
def serving(model: Path, log: Path) -> Iterator[str]:
    """The URL of a server of the model, which is ready, and has ended afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [SCRIPT, "--model", model, "--server", "True"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(log.parent), "OMP_NUM_THREADS": "1"}
    environment |= {"PORT": str(port), "PATH": f"{BIN}:{os.environ['PATH']}"}
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        while not _is_ready(f"{url}/health"):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _greedy(directory: Path, messages: list[dict[str, str]], max_tokens: int) -> str:
    """What the model says, asked directly."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
    return str(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.usefixtures("_no_proxy")
def test_the_answers_are_the_models(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], tiny_tokenizer: Callable[..., Path]
) -> None:
    model = tiny_tokenizer(tiny_checkpoint(tmp_path / "tiny"))
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    conversations = [{"system": "w9", "conversations": [{"from": "human", "value": f"w{n} w3"}]} for n in range(5)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in conversations))
    with serving(model, tmp_path / "server.log") as url:
        flags = ("--server", url, "--model", model, "--max-tokens", "6", "--concurrency", "2")
        command = [BIN / "medusa-data", "--prompts", prompts, "--output", out, *map(str, flags)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (0, ""), (tmp_path / "server.log").read_text()
        wrong_model = [*map(str, command), "--model", "nobody/nothing", "--retries", "0", "--output", f"{out}2"]
        refused = subprocess.run(wrong_model, capture_output=True, text=True, check=False)
        assert refused.returncode == 2, refused.stderr
        assert refused.stderr.startswith("error: ")
        assert refused.stderr.count("\n") == 1
        assert "nobody/nothing" in refused.stderr
        script = [SCRIPT, "--data_path", prompts, "--output_path", f"{out}3", "--served", model, "--max-tokens", "6"]
        environment = {**os.environ, "PORT": url.rpartition(":")[2]}
        done = subprocess.run(script, capture_output=True, text=True, check=False, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [row["messages"][1]["content"] for row in rows] == [f"w{n} w3" for n in range(5)]
    again = [json.loads(line) for line in Path(f"{out}3").read_text("utf-8").splitlines()]
    assert [row["messages"] for row in again] == [row["messages"] for row in rows]
    for row in rows:
        assert row["messages"][-1]["content"] == _greedy(model, row["messages"][:-1], 6)
        assert row["usable"] == (row["finish_reason"] == "stop")
    assert result.stdout.startswith(f"wrote {out}: 5 rows (0 made before)")


@pytest.fixture
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loopback address is reached directly."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
