"""What medusa-run says of an engine that is wrong: each fault is planted into a real tiny engine, found by name, and exit code 1."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from medusa_export.core.text.encoding import encode_chat
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.decoding.generate import generate
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE, Generation
from medusa_export.engines.decoding.single_slot import OneSequence
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.engines.tuning.acceptance import measure_acceptance
from medusa_export.engines.verify.run_checks import choice_findings
from medusa_export.exporter.cli.run import run_main
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.trees.acceptance import ACCEPTANCE_FILE, write_calibration
from medusa_export.heads.trees.tree import Tree

CHAIN = Tree.from_choices([[0], [0, 0], [0, 0, 0]])
QUESTIONS = [f"w{n} w{2 * n} w7 w9" for n in range(1, 7)]
NEW = 16
Found = dict[str, list[str]]


@pytest.fixture
def engine(tiny_engine: Callable[..., Any], tiny_tokenizer: Callable[..., Path]) -> Callable[..., Any]:
    """``engine(**arguments of tiny_engine)``: heads that are right, what was counted of them, and the checkpoint's tokenizer."""

    def make(quant: str = "none", *, counted: Any = None, **arguments: Any) -> Any:
        made = tiny_engine("llama", quant, drafts_well=True, tree=CHAIN, eos_token_id=None, **arguments)
        tiny_tokenizer(made.model_dir)
        info = json.loads((made.path / "engine.json").read_text())
        (made.path / "engine.json").write_text(json.dumps({**info, "eos_token_ids": []}))
        answers = counted or measure_acceptance(
            OneSequence(OnnxRuntimeEngine(made.path)),
            [(str(n), "", ids) for n, ids in enumerate(prompts_of(made))],
            max_new_tokens=NEW,
        )
        write_calibration(made.path / ACCEPTANCE_FILE, answers, {})
        made.answers = answers
        return made

    return make


def prompts_of(made: Any) -> list[list[int]]:
    tokenizer = read_tokenizer(made.path)
    return [encode_chat(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Found]:
    """``found(made, *flags)``: messages of medusa-run by name. They are what it prints, and they decide its exit code."""

    def run(made: Any, *flags: str) -> Found:
        prompts, report = tmp_path / "prompts.jsonl", tmp_path / "report.json"
        prompts.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
        given = ["--engine", made.path, "--prompts", prompts, "--report", report, "--reference", made.model_dir, *flags]
        numbers = ["--max-new-tokens", NEW, "--repeats", 1]
        monkeypatch.setattr(sys, "argv", ["medusa-run", *map(str, [*given, *numbers])])
        with pytest.raises(SystemExit) as stopped:
            run_main()
        out, err = capfd.readouterr()
        assert report.is_file(), err
        printed = " ".join(out.split())
        by_name: Found = {}
        for finding in json.loads(report.read_text())["findings"]:
            by_name.setdefault(finding["name"], []).append(finding["message"])
            assert finding["name"] in printed
        assert stopped.value.code == (1 if by_name else 0)
        return by_name

    return run


@pytest.mark.parametrize("quant", ["none", "int8_wo"])
def test_a_good_engine(quant: str, engine: Callable[..., Any], found: Callable[..., Found]) -> None:
    assert found(engine(quant)) == {}


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [(0, 1, "no draft was accepted in"), (1, 2, "tokens per step; acceptance.json predicts")],
)
def test_swapped_heads(
    one: int,
    other: int,
    message: str,
    engine: Callable[..., Any],
    found: Callable[..., Found],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The output is the same, so that nothing but what was counted can tell; where some drafts are right, nothing else at all."""
    answers, read = engine().answers, MedusaCheckpoint.read
    first, second = f"medusa_heads.{one}.", f"medusa_heads.{other}."

    def swapped(self: MedusaCheckpoint, name: str) -> torch.Tensor:
        return read(self, {first: second, second: first}.get(name[:15], name[:15]) + name[15:])

    with monkeypatch.context() as planted:
        planted.setattr(MedusaCheckpoint, "read", swapped)
        bad = engine(counted=answers)
    by_name = found(bad, "--drafts", "heads")
    assert by_name.keys() == {"tokens-per-step"}
    assert message in by_name["tokens-per-step"][0]
    assert bool(found(bad, "--drafts", "heads", "--no-expectation")) == (one == 0)
    by_choosing = found(bad).get(
        "tokens-per-step", []
    )  # only drafts for the next token are judged then, which head 0 makes
    assert [line[:22] for line in by_choosing] == ["heads were right in 0 "] * (one == 0)


def test_a_wrong_first_token(
    engine: Callable[..., Any], found: Callable[..., Found], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with and without Medusa, so that both outputs are equal."""
    made, prefill = engine(), OnnxRuntimeEngine.prefill
    monkeypatch.setattr(OnnxRuntimeEngine, "prefill", lambda self, ids: (prefill(self, ids) + 1) % 97)
    by_name = found(made, "--no-expectation")
    assert by_name.keys() == {"greedy-choice"}
    assert len(by_name["greedy-choice"]) == len({line.split(":")[0] for line in by_name["greedy-choice"]}), (
        "once a prompt"
    )
    assert "1 of 16 tokens is not the greedy choice, the first at 0" in by_name["greedy-choice"][0]


class NearTies:
    """A stand-in whose best two tokens change places between single steps and blocks, as rounded inputs have it."""

    info = SimpleNamespace(exact_products=False, sampled=8)

    def score(self, input_ids: Sequence[int], *, chunk: int, start: int = 0) -> Iterator[np.ndarray]:
        logits = np.zeros((len(input_ids) - start, 8), dtype=np.float32)
        logits[:, 3], logits[:, 4] = (5.1, 5.0) if chunk == 1 else (5.0, 5.05)
        yield logits


def test_a_near_tie_is_no_wrong_choice_whatever_drafted() -> None:
    """Also without drafts, where no tolerance was measured."""
    engine: Any = NearTies()
    assert choice_findings(engine, [("a", [1, 2], Generation([3] * 20))], 0.0) == []
    (wrong,) = choice_findings(engine, [("a", [1, 2], Generation([3] * 19 + [5]))], 0.0)
    assert wrong.startswith(
        "prompt a: 1 of 20 tokens is not the greedy choice, the first at 19: its logit is 5.05 below"
    )


def test_a_cut_prompt(engine: Callable[..., Any], found: Callable[..., Found]) -> None:
    """The engine's own template leaves the end of a long message away."""
    made = engine()
    template = made.path / "chat_template.jinja"
    cut = template.read_text().replace("m['content']", "m['content'][:5]")
    assert cut != template.read_text()
    template.write_text(cut)
    by_name = found(made, "--no-expectation")
    assert by_name.keys() == {"prompt"}
    assert len(by_name["prompt"]) == len(QUESTIONS)
    assert "the checkpoint's tokenizer makes" in by_name["prompt"][0]


@pytest.mark.parametrize("kind", ["goes on", "ends early"])
def test_an_answer_that_ends_elsewhere(kind: str, engine: Callable[..., Any], found: Callable[..., Found]) -> None:
    made = engine()
    (ids, *_) = prompts_of(made)
    tokens = generate(OnnxRuntimeEngine(made.path), ids, AUTOREGRESSIVE, max_new_tokens=NEW, eos_token_ids=()).tokens
    if kind == "goes on":
        (made.model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens[5]}))
    else:
        info = json.loads((made.path / "engine.json").read_text())
        (made.path / "engine.json").write_text(json.dumps({**info, "eos_token_ids": [tokens[5]]}))
    by_name = found(made, "--no-expectation")
    assert by_name.keys() == {"answer-end"}
    expected = "ends the checkpoint's answers, and this one goes on" if kind == "goes on" else "which does not end"
    assert expected in by_name["answer-end"][0]


@pytest.mark.parametrize("quant", ["none", "int8_wo"])
def test_a_wrong_mask(
    quant: str, engine: Callable[..., Any], found: Callable[..., Found], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draft nodes that do not see the prompt's own last token; the engine's tokens may hide it."""
    made = engine(quant, sharpness=0.1)
    tree = Tree.from_choices([[0], [1], [0, 0], [1, 0]])
    (made.path / "tree.json").write_text(tree.to_json())
    mask = Tree.mask.func  # type: ignore[attr-defined]  # a cached_property

    def blind(self: Tree) -> Any:
        seen = np.array(mask(self))
        seen[1:, 0] = False
        return seen

    wrong = type(Tree.mask)(blind)
    wrong.__set_name__(Tree, "mask")
    monkeypatch.setattr(Tree, "mask", wrong)
    by_name = found(made, "--no-expectation")
    assert "tree-logits" in by_name
    assert "a tree step differs from its paths by" in by_name["tree-logits"][0]
