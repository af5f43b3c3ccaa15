"""The benchmark against other engines on a tiny model, with the contenders that are in this environment. Nothing is timed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("peers_benchmark", BENCHMARKS / "peers.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    for name in (spec.name, "peer_models"):
        del sys.modules[name]


class StandIn:
    """Stands in for a contender's process: counts, and knows how long it would have taken."""

    def __init__(self, name: str, ms: float, calls: list[str], off: int = 0) -> None:
        self.name, self.ms, self.calls, self.off, self.next = name, ms, calls, off, 0

    def ask(self, *, prefill: list[int] | None = None, steps: int = 0) -> tuple[list[int], list[float]]:
        if prefill:
            self.next, steps = prefill[-1], 1
        self.calls.append(f"{'prefill' if prefill else 'steps'} {self.name}")
        found = list(range(self.next + 1, self.next + 1 + steps))
        self.next += steps
        return [token + self.off * (token == 9) for token in found], [100.0, *[self.ms] * (steps - 1)]


def test_race_takes_turns_and_does_not_count_their_first_step(peers: Any) -> None:
    calls: list[str] = []
    workers = {
        peers.OURS: StandIn("a", 2.0, calls),
        "b": StandIn("b", 3.0, calls, off=1),
        "c": StandIn("c", 1.0, calls),
    }
    figures, dropped = peers.race(workers, [[5], [50]], 2 + 2 * peers.STEPS_A_TURN)
    assert not dropped
    assert calls[:9] == [f"prefill {n}" for n in "abc"] + [f"steps {n}" for n in "bcacab"]
    assert figures["b"].tokens[1] == list(range(51, 53 + 2 * peers.STEPS_A_TURN))
    assert figures["b"].ms == [[3.0] * 2 * (peers.STEPS_A_TURN - 1)] * 2
    rows = peers.summary(figures)
    assert [rows[name]["ratio"] for name in (peers.OURS, "b", "c")] == [1.0, 1.5, 0.5]
    assert [rows[name]["step_ms"] for name in (peers.OURS, "b", "c")] == [2.0, 3.0, 1.0]
    assert [rows[name]["equal"] for name in (peers.OURS, "b", "c")] == [2, 1, 2]  # b errs at 9, in the first prompt


def test_rounds_start_anew_in_another_order(peers: Any) -> None:
    started: list[list[str]] = []

    def begin(names: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
        started.append(names)
        workers = {name: Stopping(name, 2.0, []) for name in names if name != "c"}
        return workers, {"c": "not there"} if "c" in names else {}

    class Stopping(StandIn):
        def stop(self) -> None:
            self.calls.append("stopped")

    prompts = [[5], [50], [500]]
    figures, absent = peers.all_rounds(begin, [peers.OURS, "b", "c", "d"], prompts, 3, 2)
    assert started == [[peers.OURS, "b", "c", "d"], ["d", peers.OURS, "b"]]
    assert absent == {"c": "not there"}
    assert list(figures) == [peers.OURS, "b", "d"]
    for found in figures.values():
        assert found.tokens == [[6, 7, 8], [501, 502, 503], [51, 52, 53]]


def test_a_contender_that_fails_on_the_way_is_named_with_the_reason(peers: Any) -> None:
    class Failing(StandIn):
        def ask(self, **request: Any) -> tuple[list[int], list[float]]:
            if len(self.calls) > 6:
                raise peers.models.UnavailableError("out of memory")
            return super().ask(**request)

    workers = {peers.OURS: StandIn("a", 2.0, []), "b": Failing("b", 3.0, list("12345")), "c": StandIn("c", 1.0, [])}
    figures, dropped = peers.race(workers, [[5], [50]], 20)
    assert dropped == {"b": "out of memory"}
    assert {name: list(map(len, found.tokens)) for name, found in figures.items()} == {
        peers.OURS: [20, 20],
        "c": [20, 20],
    }


def test_ratio_is_of_pairs(peers: Any) -> None:
    ours = peers.Figures([[1]] * 3, [[1.0], [10.0], [100.0]])
    theirs = peers.Figures([[1]] * 3, [[2.0], [20.0], [50.0]])
    row = peers.summary({peers.OURS: ours, "b": theirs})["b"]
    assert (row["ratio"], row["step_ms"], row["fastest_tenth_ms"]) == (2.0, 20.0, 2.0)


def test_what_cannot_be_had_is_absent_with_the_reason(peers: Any, tmp_path: Path) -> None:
    def no_tool(place: Any) -> Any:
        raise peers.models.UnavailableError("the tool is not there")

    group = {"tool": no_tool, "no model": lambda place: ("transformers", peers.HERE, tmp_path / "nowhere")}
    workers, absent = peers.start(group, peers.Place(tmp_path, tmp_path, tmp_path), 1, 32)
    assert not workers
    assert absent["tool"] == "the tool is not there"
    assert "nowhere" in absent["no model"]


def test_models_are_made_whole_or_not_at_all(peers: Any, tmp_path: Path) -> None:
    made = tmp_path / "models" / "one"

    def broken(out: Path) -> None:
        out.mkdir()
        (out / "half").touch()
        raise peers.models.UnavailableError("broken")

    with pytest.raises(peers.models.UnavailableError):
        peers.models.made_once(made, broken)
    assert not made.exists()
    assert peers.models.made_once(made, lambda out: out.mkdir()) == made
    assert list(made.iterdir()) == []  # nothing of the broken one
    peers.models.made_once(made, broken)  # it is there


LLAMA_CPP = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama-cpp-python is compiled where it is installed; no extra has it",
)


@pytest.mark.parametrize(
    ("quant", "option", "group", "contenders"),
    [
        ("none", "--float32", "float32", ["transformers"]),
        pytest.param("none", "--float32", "float32", ["transformers", "llama.cpp F32"], marks=LLAMA_CPP),
        pytest.param("int8_wo", "--int8", "8-bit", ["llama.cpp Q8_0"], marks=LLAMA_CPP),
    ],
)
def test_small(
    tiny_engine: Callable[..., Any], tmp_path: Path, quant: str, option: str, group: str, contenders: list[str]
) -> None:
    body, shown = _run(tiny_engine, tmp_path, quant, option, group, contenders)
    assert body["absent"] == {}
    assert set(body["rows"]) == {"medusa-export", *contenders}
    if quant == "none":
        assert [row["equal"] for row in body["rows"].values()] == [3] * (1 + len(contenders))
    assert all(len(times) == 17 for ms in body["ms"].values() for times in ms)  # 16 + 3 steps, less a first one each
    assert "equal outputs" in shown


def test_a_package_that_is_not_there(
    tiny_engine: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "llama_cpp.py").write_text("raise ModuleNotFoundError(\"No module named 'llama_cpp'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    body, shown = _run(tiny_engine, tmp_path, "int8_wo", "--int8", "8-bit", ["llama.cpp Q8_0"])
    assert body["absent"] == {"llama.cpp Q8_0": "ModuleNotFoundError: No module named 'llama_cpp'"}
    assert set(body["rows"]) == {"medusa-export"}
    assert "absent" in shown


def _run(
    tiny_engine: Callable[..., Any], tmp_path: Path, quant: str, option: str, group: str, contenders: list[str]
) -> tuple[Any, str]:
    """The group's figures, and what is printed."""
    sizes = {
        "intermediate_size": 128,
        "hidden_size": 128,
        "num_attention_heads": 4,
    }  # llama.cpp's blocks take 32 values
    tiny = tiny_engine(quant=quant, **sizes)
    prompts, figures = tmp_path / "prompts.jsonl", tmp_path / "figures.json"
    prompts.write_text("".join(json.dumps({"prompt": f"w{n} w{n + 1}"}) + "\n" for n in range(3)))
    chosen = [word for name in contenders for word in ("--contender", name)]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "peers.py", tiny.model_dir, option, tiny.path, "--prompts", prompts, "--threads", "1",
         "--new-tokens", "20", "--rounds", "1", "--work", tmp_path / "work", "--json", figures, *chosen],
        capture_output=True, text=True, env={**os.environ, "COLUMNS": "150"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(figures.read_text())["groups"][group], done.stdout
