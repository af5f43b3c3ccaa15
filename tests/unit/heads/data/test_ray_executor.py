"""ray_executor on a cluster of this machine: the same rows, failures and interruptions as without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.errors import ConfigError, MissingPackageError
from medusa_export.heads.data.chat_model import ModelUnavailableError
from medusa_export.heads.data.conversations import Conversation
from medusa_export.heads.data.distill import Summary, distill
from medusa_export.heads.data.local_executor import local_executor
from medusa_export.heads.data.openai_client import open_servers
from medusa_export.heads.data.ray_executor import ray_executor
from medusa_export.heads.data.row_store import Maker
from medusa_export.heads.decoding.sampling import Sampling

Start = Callable[[], Any]
MAKER = Maker("tiny", Sampling())


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


def chats(*turns: str) -> list[Conversation]:
    return [Conversation(f"id{number}", "ü", "Be brief.", (turn, "more")) for number, turn in enumerate(turns)]


def run(server: Any, conversations: list[Conversation], out: Path) -> Summary:
    factory = partial(open_servers, [server.url], model="tiny", retries=0)
    return distill(conversations, ray_executor(factory, MAKER, workers=2, concurrency=3), out, maker=MAKER)


@pytest.mark.usefixtures("_cluster")
def test_the_same_rows_as_without_ray(tmp_path: Path, fake_server: Start) -> None:
    server = fake_server()
    conversations = chats(*(f"turn {number}\u2028" for number in range(14)), "long", "status 400")
    summary = run(server, conversations, tmp_path / "ray.jsonl")
    assert [name for name, _ in summary.failures] == ["id15"]
    assert (summary.rows, summary.usable, summary.tokens) == (15, 14, 14 * 6 + 3)
    assert server.most_running <= 2 * 3
    model = open_servers([server.url])
    distill(conversations, local_executor(model, MAKER, 2), tmp_path / "local.jsonl", maker=MAKER)
    assert (tmp_path / "ray.jsonl").read_bytes() == (tmp_path / "local.jsonl").read_bytes()


@pytest.mark.usefixtures("_cluster")
def test_a_model_that_goes_away_and_comes_back(tmp_path: Path, fake_server: Start) -> None:
    server, out = fake_server(), tmp_path / "out.jsonl"
    conversations = chats(*(f"turn {number}" for number in range(9)), "status 401")
    with pytest.raises(ModelUnavailableError, match="see OPENAI_API_KEY") as caught:
        run(server, conversations, out)
    assert caught.value.where == f"{server.url}/v1"
    journal = tmp_path / ".out.jsonl.journal" / "rows.jsonl"
    finished = {json.loads(line)["messages"][1]["content"] for line in journal.read_text("utf-8").splitlines()}
    assert finished
    assert len(server.requests) >= 2 * len(finished) + 1
    server.requests.clear()
    assert run(server, conversations[:-1], out).reused == len(finished)
    assert not finished & set(server.asked)
    assert len(out.read_text("utf-8").splitlines()) == 9
    assert os.listdir(tmp_path) == ["out.jsonl"]
    server.stop()
    with pytest.raises(ModelUnavailableError, match="Connection"):
        run(server, chats("new"), tmp_path / "other.jsonl")


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    factory = partial(open_servers, ["http://localhost"])
    with pytest.raises(ConfigError, match="--workers: got 0"):
        ray_executor(factory, MAKER, workers=0, concurrency=1)
    with pytest.raises(ConfigError, match="--concurrency: got 0"):
        ray_executor(factory, MAKER, workers=1, concurrency=0)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackageError, match=r"medusa-export\[ray\]"):
        ray_executor(factory, MAKER, workers=1, concurrency=1)


def test_ray_is_loaded_late() -> None:
    code = "import sys, medusa_export.heads.data.ray_executor; print({'ray', 'openai'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
