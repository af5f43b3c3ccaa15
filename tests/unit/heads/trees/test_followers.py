"""What follows a token: counts by hand, candidates in their new order, and files that are none."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medusa_export.core.errors import ConfigError
from medusa_export.heads.trees.followers import FLOOR, MOST, PAIR_WEIGHT, SMOOTHING, Followers

VOCAB = 50
# 7 is followed twice by 8 in the prompt, and once by 9, twice by 1, in the answer; pairs into an answer are its own.
TEXTS = [([7, 8, 7, 8, 7, 9, 7, 1], [False] * 5 + [True, True, True]), ([7, 1], [False, True])]


def gains(followers: Followers, token: int) -> dict[int, float]:
    start, end = followers.starts[token : token + 2]
    return dict(zip(followers.tokens[start:end].tolist(), followers.gains[start:end].tolist(), strict=True))


def gain(count: int, total: int) -> float:
    return PAIR_WEIGHT * float(np.log((count / (total + SMOOTHING) + FLOOR) / FLOOR))


def test_pairs_of_answers_count_three_times() -> None:
    found = Followers.count(TEXTS, VOCAB)
    assert gains(found, 7) == pytest.approx({1: gain(6, 11), 8: gain(2, 11), 9: gain(3, 11)}, rel=1e-3)
    assert gains(found, 9) == pytest.approx({7: gain(3, 3)}, rel=1e-3)
    assert gains(found, 8) == pytest.approx({7: gain(2, 2)}, rel=1e-3)
    assert not gains(found, 1)
    assert found.starts.tolist() == [0] * 8 + [3, 4] + [5] * (VOCAB - 9)


def test_a_pair_that_was_seen_once_in_a_prompt_is_left_out() -> None:
    assert not Followers.count([([3, 4], [False, False])], VOCAB).tokens.size
    assert not Followers.count([], VOCAB).tokens.size


def test_the_most_frequent_followers_are_kept() -> None:
    """Token 0 is followed by 1 .. 49, the larger ones more often."""
    texts = [([0, follower] * follower, [False] * (2 * follower)) for follower in range(1, VOCAB)]
    found = gains(Followers.count(texts, VOCAB), 0)
    assert sorted(found) == list(range(VOCAB - MOST, VOCAB))
    assert sorted(found, key=found.__getitem__) == sorted(found)


def test_what_often_follows_the_newest_token_comes_first_and_later_heads_follow_the_best_candidate() -> None:
    followers = Followers.count(TEXTS, VOCAB)
    candidates = np.array([[[5, 9, 1], [4, 7, 2]], [[5, 9, 1], [4, 7, 2]]])
    ordered = followers.order([7, 30], candidates)
    # 7 is followed by 1 more than by 9, but the first head says 9 before 1; nothing is known of what follows 1.
    scores = {5: 0.0, 9: gain(3, 11) - 1.5 * np.log(2), 1: gain(6, 11) - 1.5 * np.log(3)}
    assert ordered[0][0].tolist() == sorted(scores, key=scores.__getitem__, reverse=True)
    assert ordered[0][1].tolist() == ([7, 4, 2] if ordered[0][0][0] == 9 else [4, 7, 2])
    assert ordered[1].tolist() == candidates[1].tolist()  # nothing is known of 30, nor of 5
    assert candidates[0].tolist() == [[5, 9, 1], [4, 7, 2]]  # as it was


def test_the_weight_is_what_fits_the_heads() -> None:
    """8 follows 7, and 9 follows 3. The weaker the heads are, the more pairs may say; right ones are left as they are."""
    followers = Followers.count([([7, 8, 3, 9] * 20, [True] * 80)], VOCAB)
    last = [7, 3] * 10
    candidates = np.array([[[5, 8, 9, 1]], [[5, 1, 4, 9]]] * 10)
    follow = np.array([[8], [9]] * 10)
    assert gains(followers, 7)[8] == pytest.approx(gain(60, 60), rel=1e-3)
    strong = followers.fitted(last, candidates, follow)
    assert strong is not None
    assert strong.order(last, candidates)[:, 0, 0].tolist() == [8, 9] * 10
    assert strong.gains.tolist() == followers.gains.tolist()
    weaker = followers.fitted(last, candidates[:, :, ::-1], np.array([[1], [9]] * 10))
    assert weaker is not None
    assert weaker.gains.tolist() == pytest.approx((followers.gains / 4).tolist(), rel=1e-2), (
        "8 is the third candidate there"
    )
    assert followers.fitted(last, candidates, np.full((20, 1), 5)) is None, (
        "8 is the second one: any weight puts it first"
    )
    unknown = followers.fitted(last, candidates, np.full((20, 1), -1))
    assert unknown is not None
    assert unknown.gains.tolist() == followers.gains.tolist(), "nothing known: as it was counted"


@given(st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=12), max_size=5), st.permutations(range(10)))
def test_candidates_stay_the_same_ones(texts: list[list[int]], level: list[int]) -> None:
    followers = Followers.count([(text, [True] * len(text)) for text in texts], VOCAB)
    ordered = followers.order([0], np.array([[level, level]]))
    assert [sorted(row) for row in ordered[0].tolist()] == [sorted(level)] * 2


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    followers = Followers.count(TEXTS, VOCAB)
    followers.save(tmp_path / "followers.npz")
    found = Followers.load(tmp_path / "followers.npz", VOCAB)
    for name in ("starts", "tokens", "gains"):
        assert np.array_equal(getattr(found, name), getattr(followers, name))
    with pytest.raises(ConfigError, match="a table of 50 tokens; expected one of the model's 51"):
        Followers.load(tmp_path / "followers.npz", VOCAB + 1)


@pytest.mark.parametrize(
    "change",
    [
        {"starts": np.arange(VOCAB + 1, dtype=np.int32)},
        {"starts": np.zeros(VOCAB + 1, dtype=np.int64)},
        {"tokens": np.full(5, VOCAB, dtype=np.int32)},
        {"tokens": np.full(5, -1, dtype=np.int32)},
        {"gains": np.array([1, 1, np.nan, 1, 1], dtype=np.float16)},
        {"gains": np.array([1, 1, -1, 1, 1], dtype=np.float16)},
        {"gains": np.ones(4, dtype=np.float16)},
    ],
)
def test_a_damaged_table_is_refused(tmp_path: Path, change: dict[str, np.ndarray]) -> None:
    followers = Followers.count(TEXTS, VOCAB)
    whole = {"starts": followers.starts, "tokens": followers.tokens, "gains": followers.gains}
    assert followers.tokens.size == 5
    np.savez(tmp_path / "followers.npz", **whole | change)
    with pytest.raises(ConfigError, match="a damaged table"):
        Followers.load(tmp_path / "followers.npz", VOCAB)


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "followers.npz"
    np.save(tmp_path / "array.npy", np.zeros(3))
    with zipfile.ZipFile(tmp_path / "pickle.npz", "w") as file:
        for name in ("starts", "tokens", "gains"):
            file.writestr(f"{name}.npy", b"\x80\x04N.")
    np.savez(tmp_path / "other.npz", starts=np.zeros(3))
    followers = Followers.count(TEXTS, VOCAB)
    followers.save(path)
    whole = path.read_bytes()
    others = [(tmp_path / name).read_bytes() for name in ("array.npy", "pickle.npz", "other.npz")]
    for content in (b"", b"PK", whole[: len(whole) // 2], whole[:200] + bytes(80) + whole[280:], *others):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"followers.npz.*expected .*; train the heads again"):
            Followers.load(path, VOCAB)
    path.unlink()
    with pytest.raises(ConfigError):
        Followers.load(path, VOCAB)
