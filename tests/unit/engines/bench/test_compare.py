"""An engine against another: figures that are known beforehand, on scorers that say what they are told, and on real engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.engines.bench.compare import compare_engines, paired, require_comparable, scores, word_f1
from medusa_export.engines.bench.report import paired_line
from medusa_export.engines.bench.runner import PromptResult, run_prompts
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE, Generation
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.heads.trees.tree import Tree


class Told:
    """A stand-in for an engine: the same distribution everywhere."""

    def __init__(self, *shares: float) -> None:
        self.logits = np.log(np.array(shares, dtype=np.float32)) + 3  # a shift that all share means nothing

    def score(self, input_ids: Sequence[int], *, chunk: int, start: int = 0) -> Iterator[np.ndarray]:
        yield np.tile(self.logits, (len(input_ids) - start, 1))


class Words:
    """A stand-in for a tokenizer: a letter is a token."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": ["abc".index(letter) for letter in text]}

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return " ".join("abc"[token] for token in tokens)


def prompt(ours: list[int], theirs: list[int]) -> PromptResult:
    return PromptResult("1", "", [0, 1], [Generation(ours)], [], other_baseline=[Generation(theirs)])


def test_figures() -> None:
    ours, theirs = Told(0.5, 0.3, 0.2), Told(0.25, 0.25, 0.5)
    prompts = [prompt([0, 0], [2, 0, 1, 2]), prompt([2, 2], [2, 2])]
    found = compare_engines(ours, theirs, prompts, ["", ""], Words(), max_length=64)
    assert (found["prompts"], found["positions"], found["equal_outputs"], found["references"]) == (2, 6, 1, 0)
    assert found["greedy_agreement"] == 0.0
    divergence = 0.25 * np.log(0.25 / 0.5) + 0.25 * np.log(0.25 / 0.3) + 0.5 * np.log(0.5 / 0.2)
    assert found["kl_mean"] == pytest.approx(divergence, rel=1e-5)
    nll = -(4 * np.log(0.2) + np.log(0.5) + np.log(0.3)) / 6
    assert found["perplexity"]["engine"] == pytest.approx(np.exp(nll), rel=1e-5)
    assert found["perplexity"]["other"] == pytest.approx(np.exp(-(4 * np.log(0.5) + 2 * np.log(0.25)) / 6), rel=1e-5)
    (row,) = found["paired"]
    first = (2 * np.log(0.2 / 0.5) + np.log(0.5 / 0.25) + np.log(0.3 / 0.25)) / 4
    differences = np.array([first, np.log(0.2 / 0.5)])
    error = differences.std(ddof=1) / 2**0.5
    assert row["difference"] == pytest.approx(differences.mean(), rel=1e-5)
    assert row["ci95"][1] - row["ci95"][0] == pytest.approx(2 * 1.96 * error, rel=1e-5)
    assert row["detectable"] == pytest.approx(2.8 * error, rel=1e-5)


def test_people_s_answers() -> None:
    ours, theirs = Told(0.5, 0.3, 0.2), Told(0.5, 0.25, 0.25)
    prompts = [prompt([0, 1], [0, 0]), prompt([1], [1]), prompt([2], [2])]
    found = compare_engines(ours, theirs, prompts, ["b", "", "a"], Words(), max_length=64)
    _, likelihood, overlap = found["paired"]
    assert likelihood["prompts"] == overlap["prompts"] == found["references"] == 2
    assert likelihood["difference"] == pytest.approx(np.log(0.3 / 0.25) / 2, rel=1e-5)
    assert overlap["difference"] == pytest.approx((2 / 3 - 0) / 2)


def test_an_answer_is_cut_to_the_context() -> None:
    engine = Told(0.5, 0.3, 0.2)
    compare_engines(engine, engine, [prompt([0], [0])], ["abcabcabc"], Words(), max_length=4)


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [("It is four.", "it is FOUR", 1.0), ("four", "five", 0.0), ("a a b", "a", 0.5), ("", "a", 0.0)],
)
def test_word_f1(text: str, reference: str, expected: float) -> None:
    assert word_f1(text, reference) == expected


def test_what_is_said_of_a_difference() -> None:
    row = {"difference": 0.1, "ci95": [0.05, 0.15], "detectable": 0.07, "differs": True, "prompts": 9}
    assert paired_line(row) == "+0.1 (+0.05 .. +0.15) over 9 prompts"
    row |= {"ci95": [-0.05, 0.25], "differs": False}
    assert paired_line(row).endswith(": no difference seen (0.07 would have been, 4 times out of 5)")
    one = row | {"ci95": None, "detectable": None, "prompts": 1}
    assert paired_line(one) == "+0.1 on one prompt, too few to tell a difference"
    assert paired_line(paired("", [0.0, 0.0, 0.0])) == "equal on all 3 prompts"
    assert paired_line(paired("", [0.5, -0.5])).startswith("+0 (-0.98 .. +0.98) over 2 prompts: no difference seen")


def test_engines(tiny_engine: Callable[..., Any]) -> None:
    """The same weights give no difference at all; INT8 weights of them give one, and speeds of both are there."""
    paths = [tiny_engine(quant=quant).path for quant in ("none", "int8_wo")]
    whole, rounded = (OnnxRuntimeEngine(path) for path in paths)
    ids = [("a", "", [3, 4, 5]), ("b", "", [9, 8, 7, 6])]
    tree = Tree.from_choices([[0], [1]])
    for other, same in ((whole, True), (rounded, False)):
        prompts = run_prompts(
            whole, tree, ids, max_new_tokens=6, repeats=2, seed=0, other=(other, AUTOREGRESSIVE)
        ).prompts
        assert [len(run) for run in (prompts[0].other_baseline, prompts[0].other_medusa)] == [2, 2]
        found = compare_engines(whole, other, prompts, ["", ""], Words(), max_length=64)
        assert (found["kl_mean"] == pytest.approx(0, abs=1e-9)) == same
        assert (found["greedy_agreement"] == 1.0) >= same
        text = prompts[0].other_baseline[0].tokens
        np.testing.assert_allclose(np.exp(scores(other, [3, 4, 5], text)).sum(-1), 1, rtol=1e-6)


def test_engines_of_two_models(tiny_engine: Callable[..., Any]) -> None:
    one, two = (OnnxRuntimeEngine(tiny_engine(vocab_size=size).path).info for size in (97, 96))
    require_comparable(one, one)
    with pytest.raises(ConfigError, match="--compare: got vocab_size 96; expected 97"):
        require_comparable(one, two)
