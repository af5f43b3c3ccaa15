"""Rules on logits, one at a time, against numbers that were worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medusa_export.core.errors import ConfigError, MedusaExportError
from medusa_export.heads.decoding.sampling import Sampling
from medusa_export.heads.decoding.token_choice import TokenChooser, token_chooser, token_logprob

LOGITS = np.array([2.0, -1.0, 1.9, 0.5], np.float32)


def scores(prompt: tuple[int, ...] = (), taken: tuple[int, ...] = (), **sampling: Any) -> list[float]:
    """What the rules make of the logits after some tokens; -inf as None."""
    chooser = token_chooser(Sampling(max_tokens=9, **sampling), prompt, [3])
    assert chooser is not None
    made = LOGITS.copy()
    for rule in chooser.rules:
        for token in taken:
            rule.take(token)
        rule.apply(made)
    return [round(float(value), 4) for value in made]


@pytest.mark.parametrize(
    ("expected", "arguments"),
    [
        ([1.0, -2.0, 1.9, 0.5], {"prompt": (0, 1), "repetition_penalty": 2.0}),
        ([1.0, -1.0, 1.9, 0.25], {"prompt": (0,), "taken": (3,), "repetition_penalty": 2.0}),
        ([2.0, -1.0, 1.4, 0.5], {"prompt": (0,), "taken": (2, 2), "presence_penalty": 0.5}),
        ([2.0, -1.5, 0.9, 0.5], {"taken": (2, 2, 1), "frequency_penalty": 0.5}),
        ([2.0, 99.0, 1.9, 0.5], {"logit_bias": {1: 100.0}}),
        ([2.0, -1.0, 1.9, -np.inf], {"taken": (0,), "min_tokens": 2}),
        ([2.0, -1.0, 1.9, 0.5], {"taken": (0, 0), "min_tokens": 2}),
        ([2.0, -np.inf, 1.9, -np.inf], {"temperature": 1.0, "top_k": 2}),
        ([2.0, -np.inf, 1.9, -np.inf], {"temperature": 1.0, "min_p": 0.5}),  # exp(-0.1) > 0.5 > exp(-1.5)
        ([2.0, -np.inf, 1.9, 0.5], {"temperature": 4.0, "min_p": 0.5}),  # exp(-1.5 / 4) > 0.5 > exp(-3 / 4)
    ],
)
def test_rules(expected: list[float], arguments: dict[str, Any]) -> None:
    before = LOGITS.copy()
    assert scores(**arguments) == expected
    assert (before == LOGITS).all()


def test_what_asks_for_nothing_has_no_chooser() -> None:
    assert token_chooser(Sampling(), [1], [2]) is None
    assert token_chooser(Sampling(top_k=5, min_p=0.5), [1], [2]) is None  # the best token stays the best
    assert token_chooser(Sampling(logprobs=0), [1], [2]) is not None


def test_log_probabilities_are_the_model_s_own() -> None:
    chooser = token_chooser(Sampling(logit_bias={1: 100.0}, logprobs=2), [1], [2])
    assert chooser is not None
    assert chooser.draw(LOGITS) == 1
    (found,) = chooser.logprobs
    shares = np.log(np.exp(LOGITS.astype(float)) / np.exp(LOGITS.astype(float)).sum())
    assert found.logprob == pytest.approx(shares[1])
    assert [token for token, _ in found.top] == [0, 2]
    assert [value for _, value in found.top] == pytest.approx([shares[0], shares[2]])
    assert token_logprob(LOGITS, 0, 0).top == ()


def test_a_rule_that_fails_is_remembered() -> None:
    class Failing:
        def apply(self, scores: Any) -> None:
            raise MedusaExportError("a", "b", "c", "d")

        def take(self, token: int) -> None:
            pytest.fail("asked again")

    chooser = TokenChooser([Failing()])
    assert chooser.draw(LOGITS) == 0
    assert isinstance(chooser.error, MedusaExportError)
    assert chooser.draw(LOGITS) == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_k", -1), ("min_p", 1.5), ("repetition_penalty", 0.0), ("presence_penalty", float("nan")), ("min_tokens", 300),
     ("logit_bias", {1: float("inf")}), ("logprobs", -1)],
)  # fmt: skip
def test_values_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        Sampling(**{name: value})
    assert refused.value.where == name
