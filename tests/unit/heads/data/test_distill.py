"""distill: what a row holds, the order, failures, and that no finished conversation is ever asked twice."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.errors import OutputError
from medusa_export.heads.data.chat_model import AnswerError, ChatAnswer, ModelUnavailableError
from medusa_export.heads.data.conversations import Conversation
from medusa_export.heads.data.distill import HOPELESS, Summary, distill
from medusa_export.heads.data.local_executor import local_executor
from medusa_export.heads.data.openai_client import open_servers
from medusa_export.heads.data.row_store import Maker
from medusa_export.heads.decoding.sampling import Sampling

Start = Callable[[], Any]
SAMPLING = Sampling()


class Echo:
    """Answers "TURN!" after a random time; "long", "empty" and "fail" do what they say, "unavailable" ends everything."""

    name = "echo"

    def __init__(self) -> None:
        self.asked: list[list[dict[str, str]]] = []
        self.running = self.most_running = 0
        self.closed = False
        self._random = random.Random(0)

    async def answer(self, messages: Sequence[Mapping[str, str]], sampling: Sampling) -> ChatAnswer:
        self.asked.append([dict(message) for message in messages])
        turn = messages[-1]["content"]
        if turn.startswith("fail"):
            raise AnswerError("echo", turn, "an answer", "ask again")
        if turn.startswith("unavailable"):
            raise ModelUnavailableError("echo", "nobody", "somebody", "start it")
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        await asyncio.sleep(self._random.random() / 100)
        self.running -= 1
        texts = {"empty": " \n", "surrogate": "\ud83d"}
        return ChatAnswer(texts.get(turn, f"{turn}!"), "length" if turn == "long" else "stop", 5)

    async def close(self) -> None:
        self.closed = True


def chats(*turns: str | tuple[str, ...]) -> list[Conversation]:
    return [
        Conversation(f"id{index}", "src", "", (turn,) if isinstance(turn, str) else turn)
        for index, turn in enumerate(turns)
    ]


def run(out: Path, conversations: Sequence[Conversation], model: Any = None, **options: Any) -> Summary:
    model = model or Echo()
    maker = Maker(model.name, options.pop("sampling", SAMPLING))
    executor = local_executor(model, maker, options.pop("concurrency", 4))
    return distill(conversations, executor, out, maker=maker, **options)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text("utf-8").split("\n") if line]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data" / "out.jsonl"


def test_a_row(out: Path) -> None:
    model, conversation = Echo(), Conversation("a", "b", "Be brief.", ("Hi", "Why"))
    sampling = Sampling(temperature=0.5, seed=3)
    summary = run(out, [conversation], model, sampling=sampling)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "Why"},
        {"role": "assistant", "content": "Why!"},
    ]
    assert model.asked == [messages[:2], messages[:4]]  # each answer is context of the next turn
    assert model.closed
    assert rows(out) == [
        {
            "id": "a",
            "source": "b",
            "key": conversation.key,
            "messages": messages,
            "model": "echo",
            "sampling": {"temperature": 0.5, "top_p": 1.0, "max_tokens": 256, "seed": 3},
            "finish_reason": "stop",
            "completion_tokens": 10,
            "usable": True,
        }
    ]
    assert (summary.rows, summary.usable, summary.reused, summary.tokens) == (1, 1, 0, 10)
    assert os.listdir(out.parent) == ["out.jsonl"]


def test_a_conversation_ends_with_an_answer_that_is_not_whole(out: Path) -> None:
    model = Echo()
    summary = run(out, chats(("long", "more"), ("a", "empty", "more"), "whole"), model)
    cut, empty, whole = rows(out)
    assert [len(row["messages"]) for row in (cut, empty, whole)] == [2, 4, 2]
    assert [row["finish_reason"] for row in (cut, empty, whole)] == ["length", "stop", "stop"]
    assert [row["usable"] for row in (cut, empty, whole)] == [False, False, True]
    assert [row["completion_tokens"] for row in (cut, empty, whole)] == [5, 10, 5]
    assert "more" not in [asked[-1]["content"] for asked in model.asked]
    assert (summary.rows, summary.usable) == (3, 1)


def test_order_and_concurrency(out: Path) -> None:
    model, seen = Echo(), []
    conversations = chats(*(f"turn {number}" for number in range(100)))
    run(out, conversations, model, concurrency=7, progress=lambda *state: seen.append(state))
    assert [row["id"] for row in rows(out)] == [f"id{number}" for number in range(100)]
    assert model.most_running == 7
    assert [asked[-1]["content"] for asked in model.asked[:7]] == [chat.turns[0] for chat in conversations[:7]]
    assert seen == [(done, 100, 5 * done) for done in range(101)]


def test_prompts_of_a_length_are_asked_together(out: Path) -> None:
    """And those that may be too long last: were they first, their failures would end the run."""
    model = Echo()
    too_long = [f"fail, for this is far too long, {number}" for number in range(2 * HOPELESS)]
    summary = run(out, chats("three", *too_long, "a", ("b", "and more of it"), "four"), model, concurrency=1)
    assert [asked[0]["content"] for asked in model.asked[:5]] == ["a", "four", "three", "b", "b"]
    assert len(summary.failures) == 2 * HOPELESS


def test_failures_are_counted_and_tried_again(out: Path) -> None:
    conversations = chats("a", ("b", "fail here"), "c", "surrogate")
    summary = run(out, conversations)
    assert [row["id"] for row in rows(out)] == ["id0", "id2"]
    assert sorted(name for name, _ in summary.failures) == ["id1", "id3"]
    assert "got fail here; expected an answer" in dict(summary.failures)["id1"]
    assert "half of a surrogate pair" in dict(summary.failures)["id3"]
    model = Echo()
    assert run(out, conversations, model).reused == 2
    assert [asked[-1]["content"] for asked in model.asked] == ["surrogate", "b", "fail here"]


def test_nothing_but_failures(out: Path) -> None:
    assert len(run(out, chats(*(f"fail {number}" for number in range(HOPELESS - 1)))).failures) == HOPELESS - 1
    assert os.listdir(out.parent) == []
    model = Echo()
    with pytest.raises(ModelUnavailableError, match=rf"{HOPELESS} failures in a row \(echo: got fail"):
        run(out, chats(*(f"fail {number}" for number in range(100))), model, concurrency=1)
    assert len(model.asked) == HOPELESS
    late = ["a", *(f"fail {number}" for number in range(2 * HOPELESS))]
    assert (
        len(run(out, chats(*late), concurrency=1).failures) == 2 * HOPELESS
    )  # some prompts are at fault, not the model


def test_a_model_that_goes_away(out: Path) -> None:
    model, conversations = Echo(), chats("a", "b", "c", "unavailable", "d, a longer one", "e, a longer one")
    with pytest.raises(ModelUnavailableError, match="got nobody"):
        run(out, conversations, model, concurrency=1)
    assert model.closed
    assert not out.exists()
    again = Echo()
    run(out, [*conversations[:3], *conversations[4:]], again)
    assert [asked[-1]["content"] for asked in again.asked] == ["d, a longer one", "e, a longer one"]
    assert [row["id"] for row in rows(out)] == ["id0", "id1", "id2", "id4", "id5"]


def test_an_error_of_the_program_cancels_the_rest(out: Path) -> None:
    def break_down(done: int, total: int, tokens: int) -> None:
        if done == 3:
            raise ZeroDivisionError

    model = Echo()
    with pytest.raises(ZeroDivisionError):
        run(out, chats(*map(str, range(50))), model, progress=break_down, concurrency=2)
    assert len(model.asked) <= 5
    assert model.closed
    assert run(out, chats(*map(str, range(50)))).reused in (3, 4)


def test_more_prompts_are_added(out: Path) -> None:
    run(out, chats("a", "b"))
    model = Echo()
    summary = run(out, list(reversed(chats("a", "b", "c"))), model)
    assert [asked[-1]["content"] for asked in model.asked] == ["c"]
    assert [row["id"] for row in rows(out)] == ["id2", "id1", "id0"]
    assert (summary.reused, summary.tokens, summary.rows) == (2, 5, 3)
    before = out.read_bytes()
    assert run(out, list(reversed(chats("a", "b", "c"))), model).reused == 3
    assert len(model.asked) == 1
    assert out.read_bytes() == before


@pytest.mark.parametrize("change", ["prompts", "sampling", "model"])
def test_rows_are_not_dropped_unasked(out: Path, change: str) -> None:
    run(out, chats("a", "b"))
    before, model = out.read_bytes(), Echo()
    options: dict[str, Any] = {}
    if change == "sampling":
        options["sampling"] = Sampling(max_tokens=9)
    if change == "model":
        model.name = "another"
    conversations = chats("a", "c") if change == "prompts" else chats("a", "b")
    with pytest.raises(OutputError, match=r"out\.jsonl: got [12] rows of other prompts, another model or .*--force"):
        run(out, conversations, model, **options)
    assert (model.asked, out.read_bytes()) == ([], before)
    assert os.listdir(out.parent) == ["out.jsonl"]
    run(out, conversations, model, force=True, **options)
    assert len(model.asked) == (1 if change == "prompts" else 2)
    assert [row["messages"][0]["content"] for row in rows(out)] == [chat.turns[0] for chat in conversations]


KILLED = 60
PROGRAM = """
import sys
from pathlib import Path
from medusa_export.heads.data.conversations import read_conversations
from medusa_export.heads.decoding.sampling import Sampling
from medusa_export.heads.data.distill import distill
from medusa_export.heads.data.local_executor import local_executor
from medusa_export.heads.data.openai_client import open_servers
from medusa_export.heads.data.row_store import Maker

url, prompts, out = sys.argv[1:]
model = open_servers([url])
maker = Maker(model.name, Sampling())
conversations, _ = read_conversations([Path(prompts)])
distill(conversations, local_executor(model, maker, 4), Path(out), maker=maker)
"""


def test_kill_9_again_and_again(tmp_path: Path, fake_server: Start) -> None:
    """The bytes are those of a run that nobody disturbed, and only what was in flight is asked again."""
    server, chance = fake_server(), random.Random(1)
    server.delay = lambda body: chance.random() / 50
    prompts, out, undisturbed = (tmp_path / name for name in ("prompts.jsonl", "out.jsonl", "undisturbed.jsonl"))
    lines = ({"id": number, "turns": [f"first {number}", f"second {number}"]} for number in range(KILLED))
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    journal = tmp_path / ".out.jsonl.journal" / "rows.jsonl"
    asked_when_finished: dict[str, int] = {}
    for enough in (20, 60):
        program = subprocess.Popen([sys.executable, "-c", PROGRAM, server.url, prompts, out])
        deadline = time.monotonic() + 30
        while len(server.requests) < enough and time.monotonic() < deadline:
            time.sleep(0.002)
        program.kill()
        assert program.wait() == -signal.SIGKILL
        assert not out.exists()
        time.sleep(0.1)  # until the server has seen the last requests
        finished = [message["content"] for row in rows(journal) for message in row["messages"]]
        now = Counter(turn for turn in server.asked if turn in finished)
        asked_when_finished = {**now, **asked_when_finished}
    assert 20 < len(asked_when_finished) < 2 * KILLED
    subprocess.run([sys.executable, "-c", PROGRAM, server.url, prompts, out], check=True)
    asked = Counter(server.asked)
    assert {turn: asked[turn] for turn in asked_when_finished} == asked_when_finished
    assert sum(asked.values()) <= 2 * KILLED + 2 * 2 * 4  # two kills, two turns, four at once
    subprocess.run([sys.executable, "-c", PROGRAM, server.url, prompts, undisturbed], check=True)
    assert out.read_bytes() == undisturbed.read_bytes()
    assert len(rows(out)) == KILLED
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "prompts.jsonl", "undisturbed.jsonl"]


def test_many_faults_and_one_result(tmp_path: Path, fake_server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)
    server, chance = fake_server(), random.Random(2)
    server.faults = chance.choices([None, 500, 503, "disconnect", "truncated", "damaged"], k=100)
    server.delay = lambda body: chance.random() / 100
    conversations = chats(*(f"turn {number}" for number in range(50)))
    summary = run(tmp_path / "faults.jsonl", conversations, open_servers([server.url], retries=20), concurrency=8)
    server.faults.clear()
    run(tmp_path / "none.jsonl", conversations, open_servers([server.url]), concurrency=1)
    assert summary.failures == []
    assert (tmp_path / "faults.jsonl").read_bytes() == (tmp_path / "none.jsonl").read_bytes()


def test_a_second_run_at_the_same_time(out: Path) -> None:
    started, go_on = threading.Event(), threading.Event()

    def wait(done: int, total: int, tokens: int) -> None:
        started.set()
        assert go_on.wait(10)

    thread = threading.Thread(target=run, args=(out, chats("a", "b")), kwargs={"progress": wait})
    thread.start()
    try:
        assert started.wait(10)
        with pytest.raises(OutputError, match="another process writing it"):
            run(out, chats("a", "b"))
    finally:
        go_on.set()
        thread.join()
    assert len(rows(out)) == 2
