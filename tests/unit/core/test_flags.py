"""Fields that are flags: their names, what a subclass keeps, and the error for one that means nothing."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from medusa_export.core.flags import flag, flags_of, requirement_error


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
