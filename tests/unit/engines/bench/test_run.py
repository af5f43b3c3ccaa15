"""medusa-run as a function, on a tiny engine: the whole report, and every reason to fail."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from medusa_export.core.errors import ConfigError, MedusaExportError, TreeError
from medusa_export.core.text.prompts import load_prompts
from medusa_export.engines.bench.html_report import render
from medusa_export.engines.bench.report import print_report
from medusa_export.engines.bench.run import RunArguments, run
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE, Generation
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.engines.tuning.auto import choose_tree
from medusa_export.heads.decoding.sampling import Sampler
from medusa_export.heads.trees.tree import Tree

QUESTIONS = ["w1 w2 w3", "w50 w4", "w7 w7 w9 w8 w20", "w33"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"question_id": i, "category": "ab"[i % 2], "turns": [question]}
        for i, question in enumerate(QUESTIONS, start=81)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def made(tiny_engine: Callable[..., Any]) -> Any:
    return tiny_engine(drafts_well=True, tree=Tree.from_choices([[0], [0, 0], [0, 0, 0]]), eos_token_id=None)


def arguments(made: Any, prompts: Path, **changes: Any) -> RunArguments:
    return RunArguments(engine=made.path, prompts=prompts, **({"max_new_tokens": 24, "repeats": 2} | changes))


def test_report_of_a_good_engine(made: Any, prompts: Path) -> None:
    progress: list[tuple[Any, ...]] = []
    report = run(
        arguments(made, prompts, drafts="heads", reference=made.model_dir), lambda *call: progress.append(call)
    )
    assert report["failures"] == []
    assert report["parity"] | {"logit_tolerance": 0, "divergences": []} == {
        "prompts": 4, "exact": 4, "ties": 0, "mismatches": 0, "logit_tolerance": 0, "divergences": [], "lossless": True,
    }  # fmt: skip
    assert report["tokens_per_step"] > 3.5
    assert report["tree"]["max_draft_len"] == 3
    assert report["reference"]["greedy_agreement"] == 1.0
    assert report["reference"]["positions"] == 4 * 24
    assert [row["category"] for row in report["categories"]] == ["a", "b"]
    assert report["arguments"]["engine"] == str(made.path)
    assert [at[:3] for at in progress] == [("prompts", i, 8) for i in range(1, 9)] + [
        ("reference", i, 4) for i in range(1, 5)
    ]
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    print_report(report, Console(file=io.StringIO()))


def test_a_line_that_grows(made: Any, prompts: Path) -> None:
    notes: list[str] = []
    run(arguments(made, prompts, limit=2, repeats=1), lambda stage, done, total, note: notes.append(note))
    assert [note.split(", ")[1] for note in notes] == ["1 of 1 equal", "2 of 2 equal"]
    assert all(float(word) > 0 for note in notes for word in note.split(" tokens/s")[0].split(" / "))


def test_stopped(made: Any, prompts: Path, tmp_path: Path) -> None:
    """After two of four prompts: the report is theirs, whatever their numbers, and nothing else is begun."""
    progress: list[tuple[Any, ...]] = []
    whole = run(arguments(made, prompts))
    asked = arguments(
        made, prompts, reference=made.model_dir, sweep_length=(8,), save_outputs=tmp_path / "outputs.jsonl"
    )
    report = run(asked, lambda *call: progress.append(call), lambda: len(progress) >= 2)
    assert [at[0] for at in progress] == ["prompts"] * 2
    assert report["stopped"] == {"prompts": 2, "of": 4}
    assert whole["stopped"] is None
    assert (report["reference"], report["sweeps"], report["failures"]) == (None, {}, [])
    names = [row["prompt"] for row in report["prompts"]]
    assert len(names) == report["parity"]["exact"] == 2
    assert set(names) < {row["prompt"] for row in whole["prompts"]}
    lengths = {row["prompt"]: row["input_tokens"] for row in whole["prompts"]}
    assert all(row["input_tokens"] == lengths[row["prompt"]] for row in report["prompts"])
    assert [json.loads(line)["id"] for line in (tmp_path / "outputs.jsonl").read_text().splitlines()] == names
    text = io.StringIO()
    print_report(report, Console(file=text))
    assert "2 of 4, then stopped" in text.getvalue()
    assert "after\n2 of 4 prompts" in render(report | {"command": "medusa-run"})


def test_another_tree_and_fewer_prompts(made: Any, prompts: Path) -> None:
    report = run(arguments(made, prompts, tree="cpu-1", limit=2, repeats=1))
    assert report["tree"]["medusa_choices"] == [[0]]
    assert report["parity"]["prompts"] == 2
    assert report["tokens_per_step"] == round(23 / 12, 4), "24 tokens, the first from the prefill; the last step is cut"
    assert report["reference"] is None


def test_min_speedup(made: Any, prompts: Path) -> None:
    report = run(arguments(made, prompts, min_speedup=1e6, limit=1))
    of_whole_answers = f"speed-up {report['speedup']['median']:.3f} of whole answers is below --min-speedup 1000000.0"
    assert report["failures"] == [of_whole_answers]
    assert run(arguments(made, prompts, min_speedup=1e-6, limit=1))["failures"] == []


def test_a_wrong_token_with_medusa_is_a_mismatch(made: Any, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medusa_export.engines.bench import runner

    generate = runner.generate

    def wrong(engine: Any, ids: list[int], tree: Any, **limits: Any) -> Generation:
        result = generate(engine, ids, tree, **limits)
        if tree is not AUTOREGRESSIVE and len(result.tokens) > 16 and ids == wanted:
            result.tokens[5] = (result.tokens[5] + 1) % 97
        return result

    wanted: list[int] = []
    monkeypatch.setattr(runner, "generate", wrong)
    run(arguments(made, prompts))
    wanted.extend(encoded(made, QUESTIONS[2]))
    report = run(arguments(made, prompts))
    assert (report["parity"]["exact"], report["parity"]["mismatches"]) == (3, 1)
    (found,) = report["parity"]["divergences"]
    assert (found["prompt"], found["position"], found["verdict"]) == ("83", 5, "mismatch")
    assert found["logit_gap"] > report["parity"]["logit_tolerance"]
    assert report["failures"] == [
        "outputs of 1 prompt differ with drafts from heads and text by more than numerical noise"
    ]
    text = found["text"]
    assert len(text["before"].split()) == 5
    assert text["baseline"].split()[0] != text["medusa"].split()[0]
    assert text["baseline"].split()[1:] == text["medusa"].split()[1:]
    assert "mismatch" in render(report | {"command": "medusa-run"})


def test_no_tie_without_noise(tiny_engine: Callable[..., Any], prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the gap; and the checkpoint rates how both outputs go on."""
    from medusa_export.engines.bench import runner

    made = tiny_engine(quant="int8_sq", drafts_well=True, eos_token_id=None)
    assert run(arguments(made, prompts, limit=1, max_new_tokens=8))["parity"]["exact"] == 1
    generate, explain = runner.generate, runner.explain

    def parting(engine: Any, ids: list[int], tree: Any, **limits: Any) -> Generation:
        result = generate(engine, ids, tree, **limits)
        if tree is not AUTOREGRESSIVE:
            result.tokens[5] = (result.tokens[5] + 1) % 97
        return result

    def narrow(*args: Any) -> Any:
        found = explain(*args)
        return replace(found, logit_gap=1e-3) if found else None

    monkeypatch.setattr(runner, "generate", parting)
    monkeypatch.setattr(runner, "explain", narrow)
    report = run(arguments(made, prompts, drafts="heads", max_new_tokens=8, repeats=1, reference=made.model_dir))
    assert (report["parity"]["mismatches"], report["parity"]["logit_tolerance"]) == (4, 0)
    rated = report["reference"]["parted"]
    assert rated["prompts"] == 4
    assert rated["ci95"][1] < 0, "a token that the model would not choose is less likely"
    page = render(report | {"command": "medusa-run"})
    assert "log-likelihood of the continuation with drafts" in page


def test_outputs_and_files(made: Any, prompts: Path, tmp_path: Path) -> None:
    report = run(arguments(made, prompts, save_outputs=tmp_path / "out.jsonl"))
    first, *rest = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert len(rest) == 3
    assert (first["id"], first["category"], first["verdict"]) == ("81", "b", "exact")
    assert first["baseline"]["tokens"] == first["medusa"]["tokens"]
    assert len(first["baseline"]["tokens"]) == 24
    assert first["baseline"]["text"].split()[0].startswith("w")
    assert len(first["medusa"]["accepted"]) < len(first["baseline"]["accepted"]) == 23
    assert [len(first[mode]["decode_ms"]) for mode in ("baseline", "medusa")] == [2, 2]
    assert set(report["files"]) >= {"decoder.onnx", "tree.json", "engine.json"}
    assert report["files"]["tree.json"]["sha256"] == hashlib.sha256((made.path / "tree.json").read_bytes()).hexdigest()


def test_what_the_tree_was_measured_on(made: Any, prompts: Path) -> None:
    assert run(arguments(made, prompts, limit=1))["path_shares"] == []
    choose_tree(made.path, load_prompts(prompts))
    report = run(arguments(made, prompts, limit=1))
    assert len(report["path_shares"]) == report["tree"]["max_draft_len"]
    assert 0 < min(report["path_shares"]) <= max(report["path_shares"]) <= 1
    assert report["heads"][0]["top10"] >= report["path_shares"][0]


def test_acceptance_of_nothing_is_refused_first(made: Any, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is measured, also where heads draft by their tree alone."""
    from medusa_export.engines.bench import run as bench

    path, ran = made.path / "acceptance.json", list[int]()
    monkeypatch.setattr(bench, "run_prompts", lambda *_, **__: ran.append(1))
    path.write_text('{"positions": 0, "paths": [], "heads": []}')
    for drafts in ("auto", "heads", "none"):
        with pytest.raises(ConfigError, match=r"acceptance\.json: got 0 positions; .*answered at more length"):
            run(arguments(made, prompts, limit=1, drafts=drafts))
    assert ran == []


def test_acceptance_without_accuracies(made: Any, prompts: Path) -> None:
    """Paths are what a search needs; a file may have nothing else."""
    paths = [{"choice": [0], "count": 3}, {"choice": [0, 0], "count": 1}]
    (made.path / "acceptance.json").write_text(json.dumps({"positions": 4, "paths": paths}))
    report = run(arguments(made, prompts, limit=1, drafts="heads"))
    assert (report["heads"], max(report["path_shares"])) == ([], 0.75)


def encoded(made: Any, question: str) -> list[int]:
    from medusa_export.core.text.encoding import encode_chat
    from medusa_export.core.text.tokenizer import read_tokenizer

    return encode_chat(read_tokenizer(made.path), [{"role": "user", "content": question}])


def test_an_engine_of_another_checkpoint(made: Any, prompts: Path, tiny_engine: Callable[..., Any]) -> None:
    report = run(arguments(made, prompts, reference=tiny_engine(seed=3).model_dir))
    (failure,) = report["failures"]
    assert failure.startswith("the engine is not the checkpoint: KL")


def test_nan_is_not_the_checkpoint(made: Any, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medusa_export.engines.bench import run as bench

    nan = float("nan")
    found = {
        "parted": [], "positions": 1, "greedy_agreement": 1.0, "kl_mean": nan, "kl_max": nan, "logit_max_abs_diff": nan,
        "perplexity": {"engine": nan, "checkpoint": 1.0},
    }  # fmt: skip
    monkeypatch.setattr(bench, "compare_with_checkpoint", lambda *args, **options: found)
    assert len(run(arguments(made, prompts, limit=1, reference=made.model_dir))["failures"]) == 1


def test_drafts_by_default(made: Any, prompts: Path) -> None:
    """Of heads and of the text; with a tree of one's own, of heads."""
    report = run(arguments(made, prompts, repeats=1))
    assert report["arguments"]["drafts"] == report["drafts"][0]["drafts"] == "both"
    assert run(arguments(made, prompts, repeats=1, tree="cpu-1"))["arguments"]["drafts"] == "heads"


@pytest.mark.parametrize("drafts", ["heads", "text", "both", "none"])
def test_other_drafts(drafts: str, made: Any, prompts: Path) -> None:
    report = run(arguments(made, prompts, drafts=drafts, repeats=1))
    assert report["parity"]["exact"] == 4
    assert [row["drafts"] for row in report["drafts"]] == [drafts]
    assert (report["tokens_per_step"] > 1.5) == (drafts in ("heads", "both")), "the tiny model repeats nothing"


def test_each_of_the_drafts(made: Any, prompts: Path) -> None:
    report, shown = run(arguments(made, prompts, each_drafts=True, repeats=1)), io.StringIO()
    assert [row["drafts"] for row in report["drafts"]] == ["both", "heads", "text"]
    assert [row["equal_outputs"] for row in report["drafts"]] == [4, 4, 4]
    print_report(report, Console(file=shown, width=200))
    assert all(f"{row['drafts']} {row['decode_speedup']:.2f}x" in shown.getvalue() for row in report["drafts"])


def test_other_drafts_are_judged_apart(made: Any, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong token of theirs is found, and is none of the measured drafts'."""
    from medusa_export.engines.bench import runner

    generate = runner.generate

    def wrong(engine: Any, ids: list[int], tree: Any, **limits: Any) -> Generation:
        result = generate(engine, ids, tree, **limits)
        if isinstance(tree, Tree) and tree.max_draft_len and len(result.tokens) > 16:
            result.tokens[5] = (result.tokens[5] + 1) % 97
        return result

    monkeypatch.setattr(runner, "generate", wrong)
    report = run(arguments(made, prompts, drafts="none", each_drafts=True, repeats=1))
    assert [report["parity"][name] for name in ("exact", "ties", "mismatches", "divergences")] == [4, 0, 0, []]
    assert {prompt["verdict"] for prompt in report["prompts"]} == {"exact"}
    assert {row["drafts"]: (row["equal_outputs"], row["mismatches"]) for row in report["drafts"]} == {
        "none": (4, 0), "heads": (0, 4), "text": (4, 0), "both": (4, 0),
    }  # fmt: skip
    said = "outputs of 4 prompts differ with drafts from the heads by more than numerical noise"
    assert report["findings"] == [{"name": "parity", "message": said}]


def test_outputs_that_end_for_another_reason(made: Any, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens, of which one output says that it ended: nothing stands behind where they part."""
    from medusa_export.engines.bench import runner

    generate = runner.generate

    def ends(engine: Any, ids: list[int], tree: Any, **limits: Any) -> Generation:
        result = generate(engine, ids, tree, **limits)
        return result if tree is AUTOREGRESSIVE else replace(result, finish_reason="stop")

    monkeypatch.setattr(runner, "generate", ends)
    report = run(arguments(made, prompts, limit=1, repeats=1))
    (found,) = report["parity"]["divergences"]
    assert (found["verdict"], found["position"], found["text"]["baseline"], found["text"]["medusa"]) == (
        "mismatch",
        24,
        "",
        "",
    )


def test_prompts_of_one_id(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own row, and the texts of where its own outputs part."""
    from medusa_export.engines.bench import runner

    path, generate = tmp_path / "twice.jsonl", runner.generate
    path.write_text("".join(json.dumps({"id": "a", "prompt": question}) + "\n" for question in QUESTIONS[:2]))

    def wrong(engine: Any, ids: list[int], tree: Any, **limits: Any) -> Generation:
        result = generate(engine, ids, tree, **limits)
        if tree is not AUTOREGRESSIVE and len(result.tokens) > 16:
            result.tokens[len(ids)] = (result.tokens[len(ids)] + 1) % 97
        return result

    monkeypatch.setattr(runner, "generate", wrong)
    report = run(arguments(made, path, repeats=1))
    rows, found = report["prompts"], report["parity"]["divergences"]
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows] == ["a", "a (line 2)"]
    assert [row["position"] for row in found] == [row["input_tokens"] for row in rows]
    assert found[0]["position"] != found[1]["position"]
    assert all(row["text"]["baseline"].split()[0] != row["text"]["medusa"].split()[0] for row in found)


def test_the_other_engine_drafts_alike(
    made: Any, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine against itself takes the same steps whatever drafts; a tree of the user's is this engine's alone."""
    from medusa_export.engines.bench import run as bench

    seen: list[Any] = []
    build = bench.build_report
    monkeypatch.setattr(bench, "build_report", lambda result, *a, **b: (seen.append(result), build(result, *a, **b))[1])
    for drafts in ("auto", "text", "heads", "none"):
        run(arguments(made, prompts, compare=made.path, drafts=drafts, max_new_tokens=64, repeats=1))
        for prompt in seen.pop().prompts:
            assert prompt.other_medusa[0].accepted == prompt.medusa[0].accepted
    run(arguments(made, prompts, compare=made.path, tree="cpu-1", repeats=1))
    steps = [[len(getattr(each, mode)[0].accepted) for each in seen[0].prompts] for mode in ("medusa", "other_medusa")]
    assert min(steps[0]) > max(steps[1]), "a tree of one draft token, and the engine's of three in a row"
    headless = Path(shutil.copytree(made.path, tmp_path / "headless"))
    info = json.loads((headless / "engine.json").read_text())
    (headless / "engine.json").write_text(json.dumps(info | {"max_depth": 0}))
    with pytest.raises(ConfigError, match="both for two engines of which one has no heads; expected text or none"):
        run(arguments(made, prompts, compare=headless, repeats=1))


class TestRefusals:
    def check(self, made: Any, prompts: Path, match: str, error: type[MedusaExportError], **changes: Any) -> None:
        with pytest.raises(error, match=match):
            run(arguments(made, prompts, **changes))

    @pytest.mark.parametrize("name", ["max_new_tokens", "repeats"])
    def test_counts(self, name: str, made: Any, prompts: Path) -> None:
        self.check(made, prompts, f"--{name.replace('_', '-')}: got 0", ConfigError, **{name: 0})

    def test_too_long_together(self, made: Any, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(OnnxRuntimeEngine, "prefill", lambda *_: pytest.fail("found before anything runs"))
        self.check(made, prompts, r"prompt 81: got \d+ tokens and 124 new ones", ConfigError, max_new_tokens=124)

    def test_drafts(self, made: Any, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(OnnxRuntimeEngine, "prefill", lambda *_: pytest.fail("found before anything runs"))
        self.check(made, prompts, "--drafts: got words; expected one of auto, heads", ConfigError, drafts="words")

    def test_trees(self, made: Any, prompts: Path) -> None:
        self.check(made, prompts, "depth 4", TreeError, tree="medusa-63")
        self.check(made, prompts, "no such file or preset", TreeError, tree="cpu-99")
        self.check(made, prompts, "--tree requires --drafts heads", ConfigError, tree="cpu-1", drafts="both")

    def test_files(self, made: Any, prompts: Path, tmp_path: Path) -> None:
        self.check(made, tmp_path / "none.jsonl", "no readable file", ConfigError)
        with pytest.raises(ConfigError, match="no engine directory"):
            run(RunArguments(engine=tmp_path, prompts=prompts))


def test_drawn_outputs_are_compared_with_the_same_random_numbers(
    made: Any, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = run(arguments(made, prompts, temperature=12.0))
    assert report["parity"]["exact"] == 4
    assert report["tokens_per_step"] > 1.2
    from medusa_export.engines.bench import runner

    class Unseeded(Sampler):
        """What a program does that forgets the seed."""

        count = 0

        def __init__(self, temperature: float, seed: Any, top_p: float) -> None:
            Unseeded.count += 1
            super().__init__(temperature, Unseeded.count)

    monkeypatch.setattr(runner, "Sampler", Unseeded)
    assert run(arguments(made, prompts, temperature=12.0))["parity"]["mismatches"] > 0
    with pytest.raises(ConfigError, match="--temperature"):
        run(arguments(made, prompts, temperature=-1.0))


def test_compare_and_sweeps(made: Any, prompts: Path, tiny_engine: Callable[..., Any]) -> None:
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    prompts.write_text("".join(json.dumps(row | {"reference": ["w5 w6", "w7"]}) + "\n" for row in rows))
    report = run(arguments(made, prompts, compare=made.path, sweep_batch=(1, 2), sweep_length=(8,)))
    found = report["comparison"]
    assert (found["greedy_agreement"], found["equal_outputs"], found["references"]) == (1.0, 4, 4)
    assert [row["difference"] for row in found["paired"]] == [0.0] * 3
    assert found["tokens_per_second"].keys() == {"baseline", "medusa", "other_baseline", "other_medusa"}
    assert found["decode_speed"].keys() == found["speed"].keys()
    assert found["decode_speed"] != found["speed"]
    assert [row["batch"] for row in report["sweeps"]["batch"]] == [1, 2]
    assert [row["prompt_length"] for row in report["sweeps"]["length"]] == [8]
    page = render(report | {"command": "medusa-run"})
    for text in ("Against another engine", "sequences at once", "prompt tokens", "equal on all 4 prompts"):
        assert text in page
    with pytest.raises(ConfigError, match="greedy decoding"):
        run(arguments(made, prompts, compare=made.path, temperature=0.5))


def test_typical_acceptance_is_called_what_it_is(made: Any, prompts: Path) -> None:
    report = run(arguments(made, prompts, temperature=1.5, typical=True))
    assert report["failures"] == []
    assert report["parity"]["lossless"] is False
    assert {prompt["verdict"] for prompt in report["prompts"]} <= {"exact", "other"}
    assert "not lossless" in render(report | {"command": "medusa-run"})
    out = io.StringIO()
    print_report(report, Console(file=out, width=120))
    assert "not lossless" in out.getvalue()


def test_top_p(made: Any, prompts: Path) -> None:
    report = run(arguments(made, prompts, temperature=1.5, top_p=0.8))
    assert report["parity"]["mismatches"] == 0
    assert report["parity"]["lossless"] is True


@pytest.mark.parametrize("changes", [{"typical": True}, {"top_p": 0.5}], ids=str)
def test_what_greedy_decoding_does_not_draw(changes: dict[str, Any], made: Any, prompts: Path) -> None:
    with pytest.raises(ConfigError, match="no --temperature"):
        run(arguments(made, prompts, **changes))
