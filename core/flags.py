"""One field of a dataclass = one flag of a command: the field has the type and the default, and ``flag`` says the rest.

A library function takes the dataclass; a command is built from it (exporter/cli/flags.py). Nothing about a flag is written twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from medusa_export.core.errors import ConfigError

_KEY = "flag"


@dataclass(frozen=True)
class Bounds:
    """The numbers that a flag takes; never NaN nor an infinity.

    Attributes:
        least: the smallest.
        most: the largest.
        above: all are larger than this.
        below: all are smaller than this.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def hold(self, value: float) -> bool:
        """Whether it is one of them."""
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    @property
    def words(self) -> str:
        """``0 or more and below 1``"""
        said = [
            text.format(f"{bound:g}")
            for bound, text in (
                (self.least, "{} or more"),
                (self.above, "above {}"),
                (self.most, "at most {}"),
                (self.below, "below {}"),
            )
            if bound is not None
        ]
        return " and ".join(said) or "a finite number"


ANY, POSITIVE, COUNT, SHARE = Bounds(), Bounds(above=0), Bounds(least=0), Bounds(least=0, below=1)
NUMBER = Bounds(least=1)  # of things, at least one


@dataclass(frozen=True)
class Flag:
    """What a command says about one of its flags.

    Attributes:
        help: one or two sentences of plain text, for --help.
        panel: the heading that it stands under in --help.
        name: its name where that is not the field's: ``--num-heads``.
        aliases: other spellings, a short one such as ``-o`` among them.
        opposite: of a switch: what turns it off, such as ``--no-force``; without one, the switch can only be turned on.
        choices: the only values that it takes, each with a description or ""; others are refused before the command starts.
        metavar: what stands for the value in --help; choices and the type say it otherwise.
        default: what --help shows as the default where the field's own does not say it: "the model's, up to 2048".
        derive: the default from the values of the other flags, for a field without one.
        requires: the flag without which this one means nothing, such as ``--engine tensorrt``; see :func:`requirement_error`.
        positional: whether it is an argument without a name.
        bounds: of a number.
        suggestions: values that a shell completes, where others are taken too.
    """

    help: str
    panel: str = ""
    name: str = ""
    aliases: tuple[str, ...] = ()
    opposite: str = ""
    choices: Mapping[str, str] = field(default_factory=dict)
    metavar: str = ""
    default: str = ""
    derive: Callable[[Mapping[str, Any]], Any] | None = None
    requires: str = ""
    positional: bool = False
    bounds: Bounds = ANY
    suggestions: tuple[str, ...] = ()


def flag(
    value: Any = MISSING,
    *,
    help: str,
    panel: str = "",
    name: str = "",
    aliases: tuple[str, ...] = (),
    opposite: str = "",
    choices: Mapping[str, str] | Sequence[str] = (),
    metavar: str = "",
    default: str = "",
    derive: Callable[[Mapping[str, Any]], Any] | None = None,
    requires: str = "",
    positional: bool = False,
    bounds: Bounds = ANY,
    suggestions: tuple[str, ...] = (),
) -> Any:
    """A field of a dataclass that is a flag of the commands built from it.

    Args:
        value: the field's default; a field without one is a flag that has to be given.
        help: see :class:`Flag`, as for all others.
    """
    described = choices if isinstance(choices, Mapping) else dict.fromkeys(choices, "")
    made = Flag(
        help,
        panel,
        name,
        aliases,
        opposite,
        described,
        metavar,
        default,
        derive,
        requires,
        positional,
        bounds,
        suggestions,
    )
    return field(default=value, metadata={_KEY: made})


@dataclass(frozen=True)
class FlagField:
    """A flag and the field that it fills.

    Attributes:
        field: the field's name.
        value: its default; ``MISSING`` where the flag has to be given.
        flag: what a command says about it.
    """

    field: str
    value: Any
    flag: Flag

    @property
    def name(self) -> str:
        """``--max-length``; of an argument without a name, the field's in capitals."""
        if self.flag.positional:
            return self.field.upper()
        return self.flag.name or "--" + self.field.replace("_", "-")

    def require(self, value: object) -> None:
        """Raise ConfigError for a number out of the flag's bounds."""
        if isinstance(value, int | float) and not self.flag.bounds.hold(value):
            raise ConfigError(self.name, f"{value}", self.flag.bounds.words, "correct it")

    @property
    def key(self) -> str:
        """The name as an identifier: ``max_length``."""
        return self.name.lstrip("-").replace("-", "_").lower()


def flags_of(kind: type) -> tuple[FlagField, ...]:
    """Every flag of a dataclass, in the order of its fields.

    A subclass that repeats a field to change the default keeps what its base says about the flag.
    """
    found = []
    for item in fields(kind):
        declared = (getattr(base, "__dataclass_fields__", {}).get(item.name) for base in kind.__mro__)
        said = next((base.metadata[_KEY] for base in declared if base and _KEY in base.metadata), None)
        if said is not None:
            found.append(FlagField(item.name, item.default, said))
    return tuple(found)


def require_bounds(arguments: object) -> None:
    """Raise ConfigError for a number of a dataclass of flags that is out of its flag's bounds."""
    for item in flags_of(type(arguments)):
        value = getattr(arguments, item.field)
        for each in value if isinstance(value, tuple) else (value,):
            item.require(each)


def requirement_error(name: str, value: object, requires: str) -> ConfigError:
    """The error for a flag that means nothing here: ``--gpu requires --engine tensorrt``.

    Args:
        name: of the flag: ``--gpu``.
        value: what it was given.
        requires: the flag that gives it a meaning: ``--engine tensorrt``.
    """
    return ConfigError(name, f"{value}", f"none: {name} requires {requires}", f"leave {name} out")
