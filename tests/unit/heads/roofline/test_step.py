"""The model's limits, worked out by hand, and what must hold for every model, GPU and set of assumptions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_export.core.errors import ConfigError
from medusa_export.heads.roofline.gpus import BY_KEY, GPUS
from medusa_export.heads.roofline.shape import HALF, ModelShape, Precision
from medusa_export.heads.roofline.step import (
    DEFAULTS,
    RANGES,
    Assumptions,
    Deployment,
    corners,
    stacked,
    step_ms,
    step_parts,
)

LLAMA_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 128256, 4, 1)
LLAMA_70B = ModelShape(80, 8192, 28672, 64, 8, 128, 128256, 4, 1)
H100 = BY_KEY["h100"]
IDEAL = Assumptions(bandwidth=1, arithmetic=1, kernel_us=0, collective_us=0)
FP8 = Precision(8, "fp8")

SHAPES = st.builds(
    lambda layers, heads, groups, width, vocab, medusa: ModelShape(
        layers, 64 * heads, 64 * width, heads, heads // groups, 64, vocab, medusa, 1
    ),
    st.integers(1, 80), st.sampled_from([8, 16, 32, 64]), st.sampled_from([1, 2, 4, 8]), st.integers(8, 512),
    st.integers(1000, 150_000), st.integers(1, 5),
)  # fmt: skip
ASSUMPTIONS = st.builds(
    Assumptions, st.floats(0.3, 1), st.floats(0.1, 1), st.floats(0, 1), st.floats(0, 20), st.floats(0, 50),
    host_us=st.floats(0, 30),
)  # fmt: skip


def test_one_row_is_bytes_over_bandwidth() -> None:
    parts = step_parts(Deployment(LLAMA_8B, H100), 1, 1, 1000, assumptions=IDEAL)
    weights = 32 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336)
    assert float(parts.layers) == pytest.approx(1e3 * 2 * weights / 3.35e12, rel=1e-3)  # activations are the rest
    assert float(parts.projection) == pytest.approx(1e3 * 2 * 128256 * 4096 / 3.35e12, rel=1e-3)
    assert float(parts.attention) == pytest.approx(1e3 * 1001 * 32 * 2 * 8 * 128 * 2 / 3.35e12)
    assert (float(parts.heads), float(parts.collectives), float(parts.launches), float(parts.waiting)) == (0, 0, 0, 0)
    assert float(parts.total) == pytest.approx(float(parts.layers + parts.projection + parts.attention))


def test_many_rows_are_operations_over_throughput() -> None:
    parts = step_parts(Deployment(LLAMA_8B, H100), 64, 64, 1, assumptions=IDEAL)
    weights = 32 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336)
    assert float(parts.layers) == pytest.approx(1e3 * 2 * weights * 4096 / 989e12)
    fp8 = step_parts(Deployment(LLAMA_8B, H100, weights=FP8), 64, 64, 1, assumptions=IDEAL)
    assert float(parts.layers / fp8.layers) == pytest.approx(1979 / 989)


def test_the_ridge_is_where_the_data_sheet_has_it() -> None:
    """989e12 / 3.35e12: some 295 operations a byte, so as many rows of 16-bit weights are free."""

    def over_one(rows: int) -> float:
        deployment = Deployment(LLAMA_8B, H100)
        one, many = (step_parts(deployment, 1, nodes, 1, assumptions=IDEAL).layers for nodes in (1, rows))
        return float(many / one)

    assert over_one(200) < 1.1  # activations only
    assert over_one(600) == pytest.approx(600 / 295, rel=0.01)


def test_heads_read_their_blocks_and_vocabulary_projections() -> None:
    """Four heads of Vicuna 7B are 1.18 GB in 16 bit, all but 0.13 of it projections to the vocabulary."""
    vicuna = Deployment(ModelShape(32, 4096, 11008, 32, 32, 128, 32000, 4, 1), H100)
    parts = step_parts(vicuna, 1, 1, 1, medusa=True, assumptions=IDEAL)
    assert float(parts.heads) == pytest.approx(1e3 * 4 * 2 * (4096 * 4096 + 32000 * 4096) / 3.35e12, rel=2e-3)
    narrow = step_parts(replace(vicuna, heads=FP8), 1, 1, 1, medusa=True, assumptions=IDEAL)
    assert float(parts.heads / narrow.heads) == pytest.approx(2, rel=2e-3)


def test_ranks_halve_bytes_but_not_launches() -> None:
    one, two = (step_parts(Deployment(LLAMA_70B, H100, tp), 1, 1, 1024) for tp in (1, 2))
    assert float(one.layers / two.layers) == pytest.approx(2, rel=1e-3)
    assert float(one.attention / two.attention) == pytest.approx(2)
    assert float(one.launches) == float(two.launches) > 0
    assert float(one.collectives) == 0
    assert float(two.collectives) > (2 * 80 + 1) * DEFAULTS.collective_us / 1e3  # type: ignore[operator]
    sixteen = step_parts(Deployment(LLAMA_70B, H100, 16), 1, 1, 1024)
    assert float(one.attention / sixteen.attention) == pytest.approx(8)  # there are eight key/value heads


def test_a_cache_of_half_the_bits_is_read_in_half_the_time() -> None:
    half, fp8 = (step_parts(Deployment(LLAMA_8B, H100, kv_bits=bits), 8, 1, 8192).attention for bits in (16, 8))
    assert float(half / fp8) == pytest.approx(2)


def test_a_window_bounds_what_is_read() -> None:
    windowed = Deployment(replace(LLAMA_8B, window=4096), H100)
    at = {past: float(step_parts(windowed, 1, 1, past).attention) for past in (1024, 4096, 32768)}
    assert at[1024] < at[4096] == at[32768]


def test_a_host_that_launches_one_by_one() -> None:
    """Where launches take longer than the work, a step takes the launches, and trees cost nothing until they catch up."""
    tiny = Deployment(ModelShape(30, 576, 1536, 9, 3, 64, 49152, 4, 1), H100)
    eager = replace(DEFAULTS, host_us=50.0)
    assert float(step_ms(tiny, 1, 1, 256, assumptions=eager)) == pytest.approx((30 * 10 + 8) * 50 / 1e3, rel=0.05)
    assert float(step_ms(tiny, 1, 1, 256)) < 1.5


def test_several_assumptions_at_once_give_what_each_gives() -> None:
    each = [DEFAULTS, IDEAL, replace(DEFAULTS, serial=0.5, host_us=20.0)]
    deployment = Deployment(LLAMA_70B, H100, 8, FP8)
    both = step_ms(deployment, 4, 32, 2048, medusa=True, assumptions=stacked(each))
    alone = [float(step_ms(deployment, 4, 32, 2048, medusa=True, assumptions=one)) for one in each]
    assert np.asarray(both).tolist() == pytest.approx(alone)


def test_corners() -> None:
    every = corners()
    assert np.shape(every.bandwidth) == (1 + 2 ** len(RANGES),)
    assert np.asarray(every.bandwidth)[0] == DEFAULTS.bandwidth
    for name, (low, high) in RANGES.items():
        assert low <= getattr(DEFAULTS, name) <= high
        assert {*np.asarray(getattr(every, name))[1:].tolist()} == {low, high}
    wide = corners(replace(DEFAULTS, kernel_us=50.0))
    assert {*np.asarray(wide.kernel_us).tolist()} == {1.5, 50.0}


@settings(deadline=None, max_examples=100)
@given(
    SHAPES,
    st.sampled_from(GPUS),
    ASSUMPTIONS,
    st.integers(1, 64),
    st.integers(1, 63),
    st.integers(0, 32_768),
    st.data(),
)
def test_more_never_costs_less(
    shape: ModelShape, gpu: Any, assumed: Assumptions, batch: int, nodes: int, past: int, data: st.DataObject
) -> None:
    deployment = Deployment(shape, gpu, data.draw(st.sampled_from([1, 2, 8])))

    def time(batch: int, nodes: int, past: int, medusa: bool = True) -> float:
        return float(step_ms(deployment, batch, nodes, past, medusa=medusa, assumptions=assumed))

    base, more = time(batch, nodes, past), data.draw(st.integers(1, 100))
    slack = 1 + 1e-12
    assert base <= slack * time(batch + more, nodes, past)
    assert base <= slack * time(batch, nodes + more, past)
    assert base <= slack * time(batch, nodes, past + more)
    assert base >= time(batch, nodes, past, medusa=False) > 0
    better = replace(assumed, bandwidth=1.0, arithmetic=1.0, serial=0.0)
    assert float(step_ms(deployment, batch, nodes, past, medusa=True, assumptions=better)) <= slack * base


@settings(deadline=None, max_examples=50)
@given(SHAPES, st.sampled_from(GPUS), st.integers(1, 64), st.integers(1, 64), st.integers(0, 4096))
def test_a_step_is_between_the_longer_and_both(shape: ModelShape, gpu: Any, batch: int, nodes: int, past: int) -> None:
    """What is hidden behind the rest is a part of the roofline's shorter side: at most twice as long without any of it."""
    deployment = Deployment(shape, gpu)
    hidden, half, none = (
        float(step_ms(deployment, batch, nodes, past, assumptions=replace(IDEAL, serial=serial)))
        for serial in (0, 0.5, 1)
    )
    assert hidden <= half <= none <= 2 * hidden * (1 + 1e-12)


@settings(deadline=None, max_examples=50)
@given(SHAPES, st.sampled_from(GPUS), st.integers(1, 32), st.integers(1, 64), st.sampled_from([2, 4, 8]))
def test_ranks_share_work_and_add_talk(shape: ModelShape, gpu: Any, batch: int, nodes: int, tp: int) -> None:
    one, many = (step_parts(Deployment(shape, gpu, ranks), batch, nodes, 512, medusa=True) for ranks in (1, tp))
    assert float(many.layers) <= float(one.layers) <= tp * float(many.layers) * (1 + 1e-9)
    assert float(many.launches) == float(one.launches)
    assert float(many.collectives) > float(one.collectives) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bandwidth": 0.0}, "bandwidth_eff"),
        ({"arithmetic": 1.2}, "arithmetic_eff"),
        ({"serial": -0.1}, "serial: got -0.1"),
    ],
)
def test_assumptions_that_cannot_be(changes: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        replace(DEFAULTS, **changes)


def test_what_a_gpu_has_not() -> None:
    with pytest.raises(ConfigError, match="A100-80GB: got fp8 products"):
        Deployment(LLAMA_8B, BY_KEY["a100-80gb"], weights=FP8)
    for tp in (0, 3):
        with pytest.raises(ConfigError, match="--tp"):
            Deployment(LLAMA_8B, H100, tp)
    assert Deployment(LLAMA_8B, H100).needed_bytes(1, 0, 1) == pytest.approx(
        LLAMA_8B.resident_bytes(1, HALF, HALF) + 131072
    )
