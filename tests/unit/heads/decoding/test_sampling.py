"""Draws follow the distribution, repeat with their seed, and the margin says how far another token is."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.heads.decoding.sampling import Sampler, Sampling
from medusa_export.heads.decoding.token_choice import token_chooser

LOGITS = np.array([0.3, -1.2, 2.0, 0.0, 1.1, -3.0], dtype=np.float32)
CRITICAL = 20.5  # of chi-square with 5 degrees of freedom, at 0.001


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    shares = np.exp(logits.astype(np.float64) / temperature)
    return shares / shares.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_shares(temperature: float) -> None:
    sampler = Sampler(temperature, 1)
    counts = np.bincount([sampler.draw(LOGITS) for _ in range(50_000)], minlength=6)
    expected = softmax(LOGITS, temperature) * 50_000
    assert ((counts - expected) ** 2 / expected).sum() < CRITICAL
    wrong = softmax(LOGITS, 1.1 * temperature) * 50_000
    assert ((counts - wrong) ** 2 / wrong).sum() > CRITICAL  # it can fail


def test_a_seed_repeats_itself() -> None:
    first, again, other = (Sampler(1.0, seed) for seed in ((3, 1), (3, 1), (3, 2)))
    texts = [[sampler.draw(LOGITS) for _ in range(40)] for sampler in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.slow
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.7])
def test_the_margin_is_what_logits_have_to_move_at_least(top_p: float) -> None:
    sampler = Sampler(0.7, 5, top_p)
    drawn = [sampler.draw(LOGITS) for _ in range(30)]
    assert all(sampler.margin(position, LOGITS, token) == 0 for position, token in enumerate(drawn))
    chance = np.random.default_rng(0)
    flipped = 0
    for position, token in enumerate(drawn):
        for _ in range(200):
            moved = LOGITS + chance.uniform(-0.3, 0.3, 6).astype(np.float32)
            other = Sampler(0.7, 5, top_p)
            for earlier in range(position):
                assert other.draw(LOGITS) == drawn[earlier]
            now = other.draw(moved)
            if now != token:
                flipped += 1
                assert sampler.margin(position, LOGITS, now) <= 0.6  # differences of logits moved by that much at most
    assert flipped > 50


def test_top_p_draws_from_the_smallest_set() -> None:
    logits = np.log(np.array([0.05, 0.5, 0.15, 0.3]))
    sampler = Sampler(1.0, 0, top_p=0.7)
    drawn = [sampler.draw(logits) for _ in range(2000)]
    assert set(drawn) == {1, 3}
    assert np.mean(np.array(drawn) == 3) == pytest.approx(0.3 / 0.8, abs=0.04)
    flat = Sampler(1.0, 0, top_p=0.9)  # more tokens than are sorted at first
    assert len({flat.draw(np.zeros(1500)) for _ in range(12_000)}) == pytest.approx(1350, abs=3)


@pytest.mark.parametrize("top_p", [0.0, 1.5, float("nan")])
def test_no_top_p(top_p: float) -> None:
    with pytest.raises(ConfigError, match="top_p"):
        Sampler(1.0, 0, top_p)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_no_temperature(temperature: float) -> None:
    with pytest.raises(
        ConfigError, match=r"--temperature: .* expected a finite number above 0, or 0 for greedy decoding;"
    ):
        Sampler(temperature)


def test_what_rows_of_data_keep_is_what_they_always_kept() -> None:
    """Or answers that were made before a field was added would be made again."""
    assert Sampling().recorded() == {"temperature": 0.0, "top_p": 1.0, "max_tokens": 256, "seed": None}
    assert Sampling(top_k=5, seed=1).recorded() == {
        "temperature": 0.0,
        "top_p": 1.0,
        "max_tokens": 256,
        "seed": 1,
        "top_k": 5,
    }


def test_by_default_nothing_changes_the_logits() -> None:
    assert token_chooser(Sampling(), [1], [2]) is None
    assert asdict(Sampling()) == {
        "temperature": 0.0, "top_p": 1.0, "max_tokens": 256, "seed": None, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": {}, "min_tokens": 0, "ignore_eos": False, "logprobs": None,
    }  # fmt: skip


INF, NAN = float("inf"), float("nan")
BOUNDS: dict[str, tuple[list[Any], list[Any]]] = {  # what is taken, and what is refused
    "temperature": ([0, 2], [-0.1, INF, NAN]),
    "top_p": ([0.01, 1], [0, 1.01, NAN]),
    "max_tokens": ([1], [0]),
    "seed": ([0, None], [-1]),
    "top_k": ([0], [-1]),
    "min_p": ([0, 1], [-0.1, 1.1]),
    "presence_penalty": ([-2, 2], [INF, NAN]),
    "frequency_penalty": ([-2, 2], [INF, NAN]),
    "repetition_penalty": ([0.1, 9], [0, INF, NAN]),
    "logit_bias": ([{}, {1: -100}], [{1: 0, 2: INF}]),
    "min_tokens": ([0, 256], [-1, 257]),
    "logprobs": ([0, None], [-1]),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds(name: str) -> None:
    good, bad = BOUNDS[name]
    for value in good:
        assert getattr(Sampling(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(ConfigError, match=f"^{name}: "):
            Sampling(**{name: value})
