"""Exact, tie or mismatch: and nothing but measured noise makes a tie."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest

from medusa_export.engines.decoding.protocols import Generation
from medusa_export.engines.verify.parity import Divergence, explain, first_divergence, logit_noise, verdict

VOCAB = 6
PROMPT = [4, 5, 4]


class TableScorer:
    """A stand-in for an engine's ``score``: logits from a table by position, disturbed in blocks of several tokens.

    Args:
        table: logits after every position.  # [positions, VOCAB]
        noise: added to token 0's logit in blocks, and ``shift`` to all of them.
    """

    def __init__(self, table: npt.NDArray[np.float32], noise: float = 0.0, shift: float = 0.0) -> None:
        self.table, self.noise, self.shift = table, noise, shift
        self.calls: list[tuple[list[int], int, int]] = []

    def score(self, input_ids: Sequence[int], *, chunk: int, start: int = 0) -> Iterator[npt.NDArray[np.float32]]:
        self.calls.append((list(input_ids), chunk, start))
        for at in range(start, len(input_ids), chunk):
            block = self.table[at : min(at + chunk, len(input_ids))].copy()
            if len(block) > 1:
                block += self.shift
                block[:, 0] += self.noise
            yield block


def table(rows: int = 40) -> npt.NDArray[np.float32]:
    """Token 0 leads token 1 by 2 everywhere, and the rest by 5."""
    return np.tile(np.array([5, 3, 0, 0, 0, 0], dtype=np.float32), (rows, 1))


def output(tokens: list[int], reason: str = "length") -> Generation:
    return Generation(tokens=tokens, finish_reason=reason)


@pytest.mark.parametrize(
    ("baseline", "medusa", "at"),
    [
        (output([1, 2, 3]), output([1, 2, 3]), None),
        (output([1, 2, 3]), output([1, 9, 3]), 1),
        (output([1, 2, 3]), output([9, 2, 3]), 0),
        (output([1, 2, 3]), output([1, 2]), 2),
        (output([1, 2]), output([1, 2, 3]), 2),
        (output([1, 2]), output([]), 0),
        (output([1, 2], "stop"), output([1, 2], "length"), 2),
        (output([1, 2], "length"), output([1, 2], "context"), 2),
        (output([1, 2, 3], "stop"), output([1, 9], "length"), 1),
    ],
)
def test_first_divergence(baseline: Generation, medusa: Generation, at: int | None) -> None:
    assert first_divergence(baseline, medusa) == at


@pytest.mark.parametrize(
    ("baseline", "medusa"),
    [
        (output([1, 2, 3]), output([1, 2])),
        (output([1, 2]), output([1, 2, 3])),
        (output([1, 2], "stop"), output([1, 2], "context")),
        (output([]), output([1])),
    ],
)
def test_an_output_that_ends_early_is_never_equal(baseline: Generation, medusa: Generation) -> None:
    scorer = TableScorer(table())
    found = explain(scorer, PROMPT, baseline, medusa)
    assert found is not None
    assert found.logit_gap is None
    assert verdict(found, float("inf")) == "mismatch"
    assert not scorer.calls


def test_equal_outputs_need_no_engine() -> None:
    scorer = TableScorer(table())
    assert explain(scorer, PROMPT, output([1, 2]), output([1, 2])) is None
    assert verdict(None, 0.0) == "exact"
    assert not scorer.calls


@pytest.mark.parametrize("at", [0, 1, 4])
def test_the_gap_is_that_of_the_deciding_position(at: int) -> None:
    """After the common text, token by token: behind the prompt and ``at`` tokens."""
    logits = table()
    logits[len(PROMPT) - 1 + at, :2] = 0.7, 0.4
    scorer = TableScorer(logits, noise=100.0)
    tokens = [2] * 8
    baseline, medusa = [*tokens[:at], 0, 3], [*tokens[:at], 1, 5]
    found = explain(scorer, PROMPT, output(baseline), output(medusa))
    assert found is not None
    assert (found.position, found.baseline_token, found.medusa_token) == (at, 0, 1)
    assert found.logit_gap == pytest.approx(0.3)
    ((text, chunk, _),) = scorer.calls
    assert (text, chunk) == ([*PROMPT, *tokens[:at]], 1)
    assert json.loads(json.dumps(found.as_dict()))["position"] == at


@pytest.mark.parametrize(
    ("gap", "tolerance", "expected"),
    [
        (0.3, 0.3, "tie"), (0.3, 0.29, "mismatch"), (0.0, 0.0, "tie"), (1e-6, 0.0, "mismatch"),
        (-0.1, 0.3, "mismatch"),  # then the baseline did not take its own best token
        (float("nan"), 1.0, "mismatch"), (0.1, float("nan"), "mismatch"), (float("inf"), 1.0, "mismatch"),
        (None, 1.0, "mismatch"),
    ],
)  # fmt: skip
def test_verdict(gap: float | None, tolerance: float, expected: str) -> None:
    assert verdict(Divergence(0, 1, 2, gap), tolerance) == expected


class TestNoise:
    answer = [0] * 12

    def test_a_movement_of_the_gap(self) -> None:
        assert logit_noise(TableScorer(table(), noise=0.25), PROMPT, self.answer, 4) == pytest.approx(0.25)

    def test_a_shift_of_all_logits_decides_nothing(self) -> None:
        assert logit_noise(TableScorer(table(), shift=3.0), PROMPT, self.answer, 4) == pytest.approx(0.0)

    def test_an_unlikely_token_decides_nothing(self) -> None:
        scorer = TableScorer(table()[:, ::-1], noise=0.5)  # token 0 is the last one now
        assert logit_noise(scorer, PROMPT, self.answer, 4) == pytest.approx(0.0)

    def test_compares_blocks_of_the_trees_size_with_single_steps(self) -> None:
        scorer = TableScorer(table())
        logit_noise(scorer, PROMPT, self.answer, 4)
        assert [call[1:] for call in scorer.calls] == [(1, 3), (4, 3)]
        assert all(text == [*PROMPT, *self.answer] for text, _, _ in scorer.calls)

    def test_one_block_is_enough(self) -> None:
        assert logit_noise(TableScorer(table(), noise=0.25), PROMPT, self.answer[:4], 4) == pytest.approx(0.25)

    def test_a_short_answer_is_one_smaller_block(self) -> None:
        scorer = TableScorer(table(), noise=0.25)
        assert logit_noise(scorer, PROMPT, self.answer[:3], 4) == pytest.approx(0.25)
        assert [call[1] for call in scorer.calls] == [1, 3]

    @pytest.mark.parametrize(("length", "nodes"), [(1, 4), (0, 4), (12, 1)])
    def test_nothing_to_measure(self, length: int, nodes: int) -> None:
        assert logit_noise(TableScorer(table(), noise=9.0), PROMPT, [0] * length, nodes) == 0.0
