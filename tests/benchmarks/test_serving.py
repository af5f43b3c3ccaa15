"""The load test on a real server with a tiny engine: every answer is compared, and clients that give up are counted as such."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """The benchmark and its own modules, as they find each other; gone after the test."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    benchmark = load("serving")
    table = importlib.import_module("serving_table")  # beside the others, where they look for each other
    found = {"serving": benchmark, "client": sys.modules["serving_client"], "table": table}
    for name in set(sys.modules) - before:
        if name.startswith(("serving_", "peer_")):
            monkeypatch.delitem(sys.modules, name)
    return found


@pytest.mark.parametrize(("server", "package"), [("triton", "tritonserver"), ("openai", "uvicorn")])
def test_small(
    server: str, package: str, modules: dict[str, ModuleType], tiny_engine: Callable[..., Any], tmp_path: Path
) -> None:
    engine = tiny_engine(drafts_well=True, max_length=512, max_position_embeddings=512).path
    prompts, figures = tmp_path / "prompts.jsonl", tmp_path / "figures.json"
    prompts.write_text("".join(json.dumps({"prompt": f"w{n} w{n + 1} w{2 * n}"}) + "\n" for n in range(5)))
    modules["serving"].main(
        engine, prompts, streams=[1, 6], tree=["none", "engine"], requests=14, max_new_tokens=40, max_batch=4, cancel=0.3,
        server=server, json_file=figures,
    )  # fmt: skip
    body = json.loads(figures.read_text())
    assert [(row["tree"], row["streams"]) for row in body["rows"]] == [
        ("none", 1), ("none", 6), ("engine", 1), ("engine", 6)
    ]  # fmt: skip
    for row in body["rows"]:
        assert (row["error"], row["lost"], row["mixed up"], row["busy"], row["mismatch"]) == (0, 0, 0, 0, 0), row
        assert row["ok"] + row["cancelled"] == row["exact"] + row["tie"] == 14
        assert row["cancelled"] > 0
        assert row["time_to_first_token_ms"]["p50"] > 0
        assert row["memory"]["last_minute_mb"]["all"] > 10
    assert body["rows"][0]["tokens_per_step"] == 1 < body["rows"][2]["tokens_per_step"]
    assert package in body["versions"]
    assert body["arguments"]["server"] == server


def test_a_load_may_end_sharply(modules: dict[str, ModuleType]) -> None:
    """What came until then counts, and whoever still asked is no longer heard."""
    client = modules["client"]
    open_streams = set[str]()

    class Endless:
        async def parts(self, question: Any, request_id: str, max_tokens: int) -> Any:
            open_streams.add(request_id)
            try:
                while True:
                    await asyncio.sleep(0.01)
                    yield client.Part([1], "a")
            finally:
                open_streams.remove(request_id)

    questions = [client.Question("q", [], [1], [], "")]
    load = client.Load(3, sys.maxsize, 1_000_000, seconds=0.3, cuts=True)
    answers, seconds = asyncio.run(client.run_load(Endless(), questions, load))
    assert 0.3 <= seconds < 5
    assert [answer.status for answer in answers] == ["cut"] * 3
    assert all(answer.tokens for answer in answers)
    assert not open_streams


def test_the_table(modules: dict[str, ModuleType]) -> None:
    """Sides in turns, and what they did, in Markdown."""
    table = modules["table"]
    asked: list[tuple[str, int]] = []

    def ask(side: str, questions: Any, load: Any) -> tuple[list[Any], float]:
        if load.cuts:
            asked.append((side, load.streams))
        answer = table.Answer(questions[0], 1.0, "cut", pieces=[(1.5, 1), (1.7, 2)], tokens=[1, 2, 3])
        return [answer] * load.streams, 2.0

    table.ask, table.settle = ask, lambda side: None
    loads = [table.Load(count, 9, 9, cuts=True) for count in (1, 4)]
    questions = [table.Question("q", [], [1], [], "")]
    cells = table.race({"a": "a", "b": "b"}, questions, loads, 2, 0.0)
    assert asked == [("a", 1), ("b", 1), ("a", 4), ("b", 4), ("b", 1), ("a", 1), ("b", 4), ("a", 4)]
    rows = [
        {"side": name, "streams": count, **table.summary(cell.answers, cell.seconds, lambda answer: "")}
        for (name, count), cell in cells.items()
    ]
    lines = list(table.markdown(rows, [1, 4]))
    assert lines[0].endswith("| 1 stream | 4 streams |")
    assert lines[2:] == ["| a | 1.5; 500, 100 | 6.0; 500, 100 |", "| b | 1.5; 500, 100 | 6.0; 500, 100 |"]
    nothing = {
        "side": "c",
        "streams": 1,
        "tokens_per_second": 0.0,
        "time_to_first_token_ms": None,
        "inter_token_ms": None,
    }
    assert list(table.markdown([nothing], [1]))[2] == "| c | 0.0; none, none |"


def test_what_is_counted(modules: dict[str, ModuleType]) -> None:
    """Times, shares and verdicts of answers that are made up."""
    client = modules["client"]
    question = client.Question("q", [], [1], [5, 6, 7, 8], "a b c d")

    def answer(status: str, tokens: list[int], text: str, pieces: list[tuple[float, int]], **more: Any) -> Any:
        return client.Answer(question, 10.0, status, pieces=pieces, tokens=tokens, text=text, **more)

    answers = [
        answer("ok", [5, 6, 7, 8], "a b c d", [(10.5, 1), (10.8, 3)], tokens_per_step=3.0),
        answer("ok", [5, 6, 9], "a b x", [(12.0, 3)], tokens_per_step=1.0),
        answer("cancelled", [5, 6], "a b", [(11.0, 2)]),
        answer("cancelled", [6], "b", [(11.0, 1)]),
        answer("busy", [], "", [], message="server: full"),
        answer("lost", [5], "a", [(11.0, 1)]),
    ]
    found = client.summary(answers, 2.0, lambda answer: "tie" if answer.text == "a b x" else "mismatch")
    assert (found["exact"], found["tie"], found["mismatch"]) == (2, 1, 1)
    assert (found["ok"], found["cancelled"], found["busy"], found["lost"]) == (2, 2, 1, 1)
    assert (found["tokens"], found["tokens_per_second"]) == (11, 5.5)
    assert found["time_to_first_token_ms"]["p50"] == 1000
    assert found["inter_token_ms"] == {"p50": 100.0, "p99": 100.0}
    assert found["pause_ms"]["p50"] == 300
    assert found["tokens_per_step"] == 2.0
    assert found["messages"] == ["server: full"]
