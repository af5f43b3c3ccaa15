"""Limits of a server: their ranges, and their way through a model's parameters."""

from __future__ import annotations

from dataclasses import asdict, fields

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.engines.decoding.draft_flags import DRAFTS_CHOICES
from medusa_export.engines.decoding.draft_kinds import DRAFTS
from medusa_export.engines.serving.options import ServingOptions

OTHERS = ServingOptions(
    max_batch=3, kv_cache_mb=77, max_queue=5, max_tokens=9, timeout_s=1.5, max_text_bytes=1000, tree_max_batch=0, threads=2,
    prefill_tokens=7, grace_s=2.5, drafts="both",
)  # fmt: skip
MAY_BE_NOTHING = {"threads", "tree_max_batch", "grace_s"}


def test_every_value_survives_as_text() -> None:
    text = OTHERS.as_text()
    assert all(isinstance(value, str) for value in text.values())
    assert ServingOptions.from_text(text) == OTHERS
    assert not set(asdict(OTHERS).items()) & set(asdict(ServingOptions()).items()), "a value that shows nothing"


def test_what_is_not_there_keeps_its_default() -> None:
    assert ServingOptions.from_text({}) == ServingOptions()
    assert ServingOptions.from_text({"max_queue": "5", "engine": "engine"}) == ServingOptions(max_queue=5)


@pytest.mark.parametrize("name", [item.name for item in fields(ServingOptions) if item.name != "drafts"])
def test_ranges(name: str) -> None:
    least = 0 if name in MAY_BE_NOTHING else 1
    assert getattr(ServingOptions(**{name: least}), name) == least
    flag = f"--{name.replace('_', '-')}"
    for value in (least - 1, -(10**9)):
        with pytest.raises(ConfigError, match=f"{flag}: got {value}; expected {least} or more"):
            ServingOptions(**{name: value})


def test_drafts_by_name() -> None:
    assert {ServingOptions(drafts=name).drafts for name in DRAFTS_CHOICES} == {"auto", *DRAFTS}
    with pytest.raises(ConfigError, match="--drafts: got words; expected one of auto, heads, text, both, none"):
        ServingOptions.from_text({"drafts": "words"})


@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_no_numbers_of_seconds(text: str) -> None:
    with pytest.raises(ConfigError, match="--timeout-s"):
        ServingOptions.from_text({"timeout_s": text})


@pytest.mark.parametrize(
    ("name", "text"), [("max_batch", "many"), ("max_queue", "1.5"), ("timeout_s", ""), ("threads", "0x2")]
)
def test_parameters_that_are_no_numbers(name: str, text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ServingOptions.from_text({name: text})
    assert (refused.value.where, refused.value.got) == (name, repr(text))


def test_endless_is_no_number_of_seconds() -> None:
    with pytest.raises(ConfigError, match="--grace-s: got inf; expected a finite number, 0 or more;"):
        ServingOptions(grace_s=float("inf"))
