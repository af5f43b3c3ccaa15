"""TensorRT-LLM behind the runner, against a stand-in for its runtime API: no TensorRT-LLM and no GPU is here."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medusa_export.core.errors import ConfigError, MissingPackageError, TreeError
from medusa_export.engines.backends import open_engine
from medusa_export.engines.bench.run import RunArguments, run
from medusa_export.engines.decoding.generate import generate
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE
from medusa_export.engines.trtllm import session as trtllm_session
from medusa_export.engines.trtllm.engine import RunError
from medusa_export.heads.contract.engine_info import EngineInfo
from medusa_export.heads.decoding.sampling import Sampler
from medusa_export.heads.trees.tree import Tree

TREE = Tree.from_choices([[0], [1], [0, 0]])
END, VOCAB = 2, 32  # of the stand-in


def next_token(text: list[int]) -> int:
    return END if len(text) == 60 else 3 + (text[-1] * 7 + len(text)) % 29


def greedy(prompt: list[int], count: int, ends: tuple[int, ...] = (END,)) -> list[int]:
    answer: list[int] = []
    while len(answer) < count and not (answer and answer[-1] in ends):
        answer.append(next_token([*prompt, *answer]))
    return answer


@pytest.fixture
def engine_dir(tmp_path: Path) -> Path:
    """What build.sh leaves, without engines in it."""
    path = tmp_path / "engine"
    for name, mode in (("medusa", 4), ("baseline", 1)):
        (path / name).mkdir(parents=True)
        pretrained = {"mapping": {"tp_size": 1}, "max_draft_len": 3, "num_medusa_heads": 2}
        config = {
            "version": "1.2.1",
            "pretrained_config": pretrained,
            "build_config": {"speculative_decoding_mode": mode},
        }
        (path / name / "config.json").write_text(json.dumps(config))
    EngineInfo(
        backend="tensorrt-llm", form="fp8", precision="FP8 weights, in TensorRT-LLM 1.2.1", max_length=512, max_depth=2,
        top_k=16, num_hidden_layers=1, num_key_value_heads=2, head_dim=16, hidden_size=64, vocab_size=VOCAB,
        eos_token_ids=(END,), session_options={}, heads_session_options={}, source={},
    ).save(path)  # fmt: skip
    (path / "tree.json").write_text(TREE.to_json())
    return path


def test_counts_the_tokens_of_every_step(engine_dir: Path, standin_tensorrt_llm: Any) -> None:
    engine, prompt = open_engine(engine_dir), [5, 9, 11]
    medusa = generate(engine, prompt, TREE, max_new_tokens=12, eos_token_ids=())
    plain = generate(engine, prompt, AUTOREGRESSIVE, max_new_tokens=12, eos_token_ids=())
    assert medusa.tokens == plain.tokens == greedy(prompt, 12, ())
    assert medusa.accepted == [3, 3, 3, 2]  # the first token is the prefill's
    assert plain.accepted == [1] * 11
    assert (medusa.finish_reason, plain.finish_reason) == ("length", "length")
    assert medusa.prefill_ms > 0
    assert medusa.decode_ms > 0
    (first, options), (second, plain_options) = standin_tensorrt_llm.opened
    assert (first, options["medusa_choices"]) == ("medusa", [[0], [1], [0, 0]])
    assert (second, plain_options["medusa_choices"]) == ("baseline", None)
    assert options["max_tokens_in_paged_kv_cache"] == 1024  # so that both fit on one GPU
    assert options["is_orchestrator_mode"] is False


def test_ends_at_an_end_id(engine_dir: Path, standin_tensorrt_llm: Any) -> None:
    engine = open_engine(engine_dir)
    prompt = [5, 9]
    for tree in (TREE, AUTOREGRESSIVE):
        found = generate(engine, prompt, tree, max_new_tokens=80, eos_token_ids=(END,))
        assert (found.tokens, found.finish_reason) == (greedy(prompt, 80), "stop")
    other = greedy(prompt, 80)[2]
    found = generate(engine, prompt, TREE, max_new_tokens=80, eos_token_ids=(END, other))
    assert (found.tokens, found.finish_reason) == (greedy(prompt, 80, (END, other)), "stop")
    assert standin_tensorrt_llm.executors[0].requests[-1].stop_words == [[other]]


def test_an_end_id_that_the_runtime_keeps_for_itself(
    engine_dir: Path, standin_tensorrt_llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(engine_dir)
    prompt = [5, 9]
    generate(engine, prompt, TREE, max_new_tokens=1, eos_token_ids=())
    executor = standin_tensorrt_llm.executors[0]
    answer = executor.make_result

    def without_end(request: Any, tokens: list[int], *, last: bool) -> Any:
        result = answer(request, tokens, last=last)
        result.output_token_ids = [[token for token in tokens if token != END]]
        return result

    monkeypatch.setattr(executor, "make_result", without_end)
    assert generate(engine, prompt, TREE, max_new_tokens=80, eos_token_ids=(END,)).tokens == greedy(prompt, 80)


def test_ranks_are_started_by_the_runtime(engine_dir: Path, standin_tensorrt_llm: Any) -> None:
    config = json.loads((engine_dir / "medusa" / "config.json").read_text())
    config["pretrained_config"]["mapping"]["tp_size"] = 2
    (engine_dir / "medusa" / "config.json").write_text(json.dumps(config))
    generate(open_engine(engine_dir), [5], TREE, max_new_tokens=2, eos_token_ids=())
    options = standin_tensorrt_llm.opened[0][1]
    assert (options["is_orchestrator_mode"], options["device_ids"]) == (True, [0, 1])


def test_another_tree_opens_the_engine_anew(engine_dir: Path, standin_tensorrt_llm: Any) -> None:
    engine, small = open_engine(engine_dir), Tree.from_choices([[0]])
    for tree in (TREE, TREE, small, small):
        generate(engine, [5], tree, max_new_tokens=4, eos_token_ids=())
    assert [options["medusa_choices"] for _, options in standin_tensorrt_llm.opened] == [[[0], [1], [0, 0]], [[0]]]
    assert [executor.open for executor in standin_tensorrt_llm.executors] == [False, True]
    engine.close()
    assert not any(executor.open for executor in standin_tensorrt_llm.executors)


@pytest.mark.parametrize(
    ("choices", "error"), [([[0], [1], [2], [3]], ConfigError), ([[0], [0, 0], [0, 0, 0]], TreeError)]
)
def test_trees_that_it_was_not_built_for(
    choices: list[list[int]], error: type[Exception], engine_dir: Path, standin_tensorrt_llm: Any
) -> None:
    with pytest.raises(error):
        generate(open_engine(engine_dir), [5], Tree.from_choices(choices), max_new_tokens=4, eos_token_ids=())
    assert standin_tensorrt_llm.opened == []


def test_refusals(engine_dir: Path, standin_tensorrt_llm: Any) -> None:
    engine = open_engine(engine_dir)
    with pytest.raises(ConfigError, match="random numbers of its own"):
        generate(engine, [5], TREE, max_new_tokens=4, eos_token_ids=(), sampler=Sampler(1.0))
    with pytest.raises(RunError, match="TensorRT-LLM: got prompt is longer than max_input_len; expected an answer"):
        generate(engine, [5] * 101, TREE, max_new_tokens=4, eos_token_ids=())
    (engine_dir / "baseline" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"run build.sh"):
        open_engine(engine_dir)


def test_engines_of_other_releases(engine_dir: Path, standin_tensorrt_llm: Any) -> None:
    (engine_dir / "medusa" / "config.json").write_text(json.dumps({"version": "1.3.0rc12"}))
    with pytest.raises(ConfigError, match="no engine backend"):
        open_engine(engine_dir)


def test_no_tensorrt_llm(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)
    with pytest.raises(MissingPackageError, match="tensorrt_llm"):
        generate(open_engine(engine_dir), [5], TREE, max_new_tokens=4, eos_token_ids=())


@pytest.mark.parametrize("api", ["runner", "llm"])
def test_a_runtime_that_says_nothing(api: str, engine_dir: Path, standin_tensorrt_llm: Any) -> None:
    engine = open_engine(engine_dir, trtllm_api=api, timeout=0.2)
    generate(engine, [5], TREE, max_new_tokens=2, eos_token_ids=())
    executor = standin_tensorrt_llm.executors[0]
    executor.silent = True
    with pytest.raises(RunError, match=r"got no answer within 0\.2 seconds; .*raise --timeout"):
        generate(engine, [5], TREE, max_new_tokens=2, eos_token_ids=())
    assert executor.cancelled == [1]
    with pytest.raises(ConfigError, match="--timeout: got 0; expected above 0"):
        run(RunArguments(engine_dir, engine_dir, timeout=0))


class TestLlmApi:
    """Through the LLM API the same answers, steps and logits as through ModelRunnerCpp."""

    def test_steps_and_counters(self, engine_dir: Path, standin_tensorrt_llm: Any) -> None:
        for ends in ((), (END,), (END, greedy([5, 9], 80)[2])):
            found = [
                generate(open_engine(engine_dir, trtllm_api=api), [5, 9], tree, max_new_tokens=70, eos_token_ids=ends)
                for tree in (TREE, AUTOREGRESSIVE)
                for api in ("runner", "llm")
            ]
            assert found[0].tokens == greedy([5, 9], 70, ends)
            assert found[0].counted_drafts == (
                sum(found[0].accepted) - len(found[0].accepted),
                3 * len(found[0].accepted),
            )
            for ours, theirs in (found[:2], found[2:]):
                for name in ("tokens", "accepted", "finish_reason", "counted_drafts"):
                    assert getattr(ours, name) == getattr(theirs, name), name

    def test_what_is_asked_for(self, engine_dir: Path, standin_tensorrt_llm: Any) -> None:
        engine = open_engine(engine_dir, trtllm_api="llm")
        for tree in (TREE, AUTOREGRESSIVE):
            generate(engine, [5], tree, max_new_tokens=2, eos_token_ids=())
        (name, medusa), (other, plain) = standin_tensorrt_llm.opened
        assert (name, other, plain["speculative_config"]) == ("medusa", "baseline", None)
        config = medusa["speculative_config"]
        assert (config.max_draft_len, config.num_medusa_heads) == (3, 2)
        assert config.medusa_choices == [[0], [1], [0, 0]]
        assert medusa["kv_cache_config"].max_tokens == 1024
        engine.close()
        assert not any(executor.open for executor in standin_tensorrt_llm.executors)

    def test_logits(self, engine_dir: Path, standin_tensorrt_llm: Any) -> None:
        text = [5, 9, *greedy([5, 9], 6, ())]
        rows = [
            np.concatenate(list(open_engine(engine_dir, trtllm_api=api).score(text, chunk=1, start=2)))
            for api in ("runner", "llm")
        ]
        np.testing.assert_array_equal(*rows)

    def test_refusals(self, engine_dir: Path, standin_tensorrt_llm: Any) -> None:
        with pytest.raises(RunError, match="longer than max_input_len"):
            generate(open_engine(engine_dir, trtllm_api="llm"), [5] * 101, TREE, max_new_tokens=4, eos_token_ids=())
        with pytest.raises(ConfigError, match="--trtllm-api: got 'pytorch'; expected one of runner, llm"):
            open_engine(engine_dir, trtllm_api="pytorch")
        for version, message in (
            ("0.19.0", "not known to take a tree for a built engine"),
            ("1.3.0", "no engine backend"),
        ):
            config = json.loads((engine_dir / "medusa" / "config.json").read_text()) | {"version": version}
            (engine_dir / "medusa" / "config.json").write_text(json.dumps(config))
            with pytest.raises(ConfigError, match=message):
                open_engine(engine_dir, trtllm_api="llm")


class TestScore:
    def test_decode_steps(self, engine_dir: Path, standin_tensorrt_llm: Any) -> None:
        engine, prompt = open_engine(engine_dir), [5, 9]
        text = [*prompt, *greedy(prompt, 6, ())]
        rows = np.concatenate(list(engine.score(text, chunk=1, start=2)))
        assert rows.shape == (6, VOCAB)
        assert rows.argmax(-1).tolist() == [next_token(text[: at + 1]) for at in range(2, 8)]
        (executor,) = standin_tensorrt_llm.executors
        assert [request.max_tokens for request in executor.requests] == [7]  # one request, all its own steps

    def test_a_text_of_another(self, engine_dir: Path, standin_tensorrt_llm: Any) -> None:
        """Where the engine would not have said it, every prefix is a prefill of its own."""
        engine, prompt = open_engine(engine_dir), [5, 9]
        own = greedy(prompt, 6, ())
        text = [*prompt, *own[:2], (own[2] + 3) % VOCAB, 8, 8]
        rows = np.concatenate(list(engine.score(text, chunk=1, start=2)))
        assert rows.argmax(-1).tolist() == [next_token(text[: at + 1]) for at in range(2, 7)]
        (executor,) = standin_tensorrt_llm.executors
        assert [request.max_tokens for request in executor.requests] == [6, 1, 1, 1]

    def test_prefills(self, engine_dir: Path, standin_tensorrt_llm: Any) -> None:
        rows = np.concatenate(list(open_engine(engine_dir).score([5, 9, 3, 4], chunk=64, start=1)))
        assert rows.argmax(-1).tolist() == [next_token([5, 9]), next_token([5, 9, 3]), next_token([5, 9, 3, 4])]
        assert [len(request.input_token_ids) for request in standin_tensorrt_llm.executors[0].requests] == [2, 3, 4]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [{"prompt": text} for text in ("one two", "three four five", "six")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "prompts.jsonl"


@pytest.mark.parametrize(("strays", "exact", "failures"), [(None, 3, 0), (5, 0, 1)])
def test_the_same_report(
    strays: int | None, exact: int, failures: int, engine_dir: Path, prompts: Path, tiny_tokenizer: Callable[..., Path],
    standin_tensorrt_llm: Any,
) -> None:  # fmt: skip
    tiny_tokenizer(engine_dir)
    standin_tensorrt_llm.strays = strays
    report = run(RunArguments(engine_dir, prompts, max_new_tokens=16, repeats=2))
    assert report["engine"]["backend"] == "tensorrt-llm"
    assert report["device"] == "a GPU whose name is unknown", "torch sees none here; it is never this machine's CPU"
    assert report["parity"]["exact"] == exact
    assert len(report["failures"]) == failures
    assert report["tree"]["max_draft_len"] == 3
    assert report["tokens_per_step"] > 2
    assert report["counted_drafts"]["accepted"] > report["counted_drafts"]["drafts"] / 2
    assert report["accepted"][2] > report["accepted"][0]  # three tokens a step
    for entry in report["parity"]["divergences"]:
        assert entry["position"] == 5
        assert entry["logit_gap"] == 0.125  # what the stand-in's logits say, from the engine without Medusa
        assert entry["verdict"] == "mismatch"  # its noise is nothing


def test_the_script_of_an_export(
    engine_dir: Path, tiny_tokenizer: Callable[..., Path], standin_tensorrt_llm: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    """run.py is a copy of the module, and needs nothing of this package."""
    tiny_tokenizer(engine_dir)
    script = tmp_path / "run.py"
    script.write_bytes(Path(trtllm_session.__file__).read_bytes())
    assert "medusa_export" not in script.read_text()
    monkeypatch.setattr(
        sys, "argv", ["run.py", "--engine", str(engine_dir), "--prompt", "one two", "--max-new-tokens", "9"]
    )
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.startswith("medusa: ")
    assert [line.split(" tokens/s, ")[1] for line in printed.splitlines() if "tokens/s" in line] == [
        "2.67 tokens per step", "1.00 tokens per step",
    ]  # fmt: skip
    assert not any(executor.open for executor in standin_tensorrt_llm.executors)
