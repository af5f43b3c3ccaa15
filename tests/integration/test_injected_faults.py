"""The share of faults, put in by machine, that verify finds; it may not fall. ``python -m tests.faults`` draws more of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.faults.exports import KINDS, make
from tests.faults.measure import measure
from tests.faults.mutations import drawn, faults

COUNT, SEED = 24, 7
# Faults that no check can see, with the reason; docs/trust.md has the same list.
BLIND = {
    r"alter .* in .*tokenizer_config\.json": "keys that nothing reads here",
    r"alter arguments\..* in medusa\.json": "arguments that leave no trace in the files",
    r"\w+ (weight|kv|input)_amax/.* in scales\.safetensors": "calibrations that no written number depends on",
    r"alter .*producer.*": "labels of the maker",
    r"alter pretrained_config\.embedding_sharding_dim in .*config\.json": "how a table is cut that one rank holds whole",
    (
        r"(alter (precision|exact_products|source|\w*session_options)\S* in|another export's) "
        r"tensorrt_llm/1/engine\.json"
    ): "labels, and what no part of it reads",
}
# Share with the source, and without.
LEAST = {"fp8, two ranks, engine": (0.95, 0.7), "hf, fp8": (0.95, 0.45), "Triton, TensorRT-LLM": (0.85, 0.7)}


@pytest.mark.parametrize("with_source", [True, False], ids=["with the source", "without"])
@pytest.mark.parametrize("kind", LEAST)
def test_the_share_does_not_fall(kind: str, with_source: bool, tmp_path: Path) -> None:
    out, other = make(kind, tmp_path / "a"), make(kind, tmp_path / "b", seed=1)
    every = list(faults(out, other))
    assert {fault.kind for fault in every} >= {"alter", "drop"}
    chosen = drawn(every, COUNT, SEED)
    if not with_source:
        (tmp_path / "a/model").rename(tmp_path / "a/hidden")
    outcome = measure(out, chosen, tmp_path, with_source=with_source)
    assert outcome.crashed == {}
    assert outcome.share >= LEAST[kind][not with_source], outcome.missed
    if with_source:
        unexplained = [name for name in outcome.missed if not any(re.fullmatch(pattern, name) for pattern in BLIND)]
        assert unexplained == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_good_export_has_no_findings_without_its_source(kind: str, tmp_path: Path) -> None:
    out = make(kind, tmp_path / "a")
    (tmp_path / "a/model").rename(tmp_path / "a/hidden")
    assert measure(out, [], tmp_path, with_source=False).total == 0
