"""Fields that are flags: their names, what a subclass keeps, and the error for one that means nothing."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.core.flags import (
    COUNT,
    NUMBER,
    POSITIVE,
    SHARE,
    Bounds,
    flag,
    flags_of,
    require_bounds,
    requirement_error,
)


@dataclass(frozen=True)
class Base:
    model_dir: Path = flag(help="Model.")
    steps: int = flag(3, help="Steps.", name="--num-steps")
    hidden: int = 7


@dataclass(frozen=True)
class Longer(Base):
    steps: int = 9
    out: Path = flag(Path("x"), help="Out.", positional=True)


def test_a_field_is_a_flag_and_stays_a_field() -> None:
    model, steps = flags_of(Base)
    assert (model.field, model.name, model.key, model.value) == ("model_dir", "--model-dir", "model_dir", MISSING)
    assert (steps.field, steps.name, steps.key, steps.value) == ("steps", "--num-steps", "num_steps", 3)
    assert Base(Path("m")) == Base(model_dir=Path("m"), steps=3, hidden=7)
    assert [item.name for item in fields(Base)] == ["model_dir", "steps", "hidden"]


def test_a_subclass_changes_the_default_and_keeps_the_flag() -> None:
    _, steps, out = flags_of(Longer)
    assert (steps.name, steps.value, steps.flag.help) == ("--num-steps", 9, "Steps.")
    assert (out.name, out.key) == ("OUT", "out")


def test_choices_may_have_descriptions() -> None:
    @dataclass(frozen=True)
    class Kinds:
        plain: str = flag("a", help="", choices=("a", "b"))
        said: str = flag("a", help="", choices={"a": "first"})

    assert [dict(item.flag.choices) for item in flags_of(Kinds)] == [{"a": "", "b": ""}, {"a": "first"}]


def test_the_error_of_a_flag_that_means_nothing() -> None:
    error = requirement_error("--gpu", "sm89", "--engine tensorrt")
    assert str(error) == "--gpu: got sm89; expected none: --gpu requires --engine tensorrt; leave --gpu out"


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "words"),
    [
        (Bounds(), (-3, 0.5), (), "a finite number"),
        (NUMBER, (1, 7), (0, -1), "1 or more"),
        (COUNT, (0, 0.5), (-1e-9,), "0 or more"),
        (POSITIVE, (1e-9,), (0, -1), "above 0"),
        (SHARE, (0, 0.99), (1, -0.1), "0 or more and below 1"),
        (Bounds(above=0, most=1), (0.1, 1), (0, 1.1), "above 0 and at most 1"),
    ],
)
def test_bounds(bounds: Bounds, inside: tuple[float, ...], outside: tuple[float, ...], words: str) -> None:
    assert bounds.words == words
    assert all(map(bounds.hold, inside))
    assert not any(map(bounds.hold, (*outside, math.nan, math.inf, -math.inf)))


def test_a_number_out_of_bounds_is_named_by_its_flag() -> None:
    @dataclass(frozen=True)
    class Numbers:
        rows: int = flag(3, help="", name="--batch-tokens", bounds=NUMBER)
        lengths: tuple[int, ...] = flag((), help="", bounds=NUMBER)
        limit: int | None = flag(None, help="", bounds=NUMBER)

    require_bounds(Numbers(1, (2, 3)))
    for wrong in (Numbers(rows=0), Numbers(lengths=(4, 0)), Numbers(limit=0)):
        with pytest.raises(
            ConfigError, match=r"^--(batch-tokens|lengths|limit): got 0; expected 1 or more; correct it$"
        ):
            require_bounds(wrong)
