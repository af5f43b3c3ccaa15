"""Commands from dataclasses: every field that is a flag (core/flags.py) becomes one, and the command gets an instance."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, replace
from typing import Any, TypeVar, get_type_hints

import typer

from medusa_export.core.errors import ConfigError, MedusaExportError
from medusa_export.core.flags import FlagField, flag, flags_of, requirement_error
from medusa_export.exporter.cli.flags.help_page import Flags, command_class, group_class
from medusa_export.exporter.cli.flags.parameters import CONTEXT, PRINT_CONFIG, general_parameters, parameter
from medusa_export.exporter.cli.flags.yaml_file import flags_as_yaml

T = TypeVar("T")
Body = Callable[..., None]
SETTINGS = {"help_option_names": ["-h", "--help"]}


@dataclass(frozen=True)
class Common:
    """The flags of every command."""

    verbose: bool = flag(False, aliases=("-v",), help="Log what happens, and show tracebacks.")


class Given(dict[str, Any]):
    """The flags that were given, by ``FlagField.key``, where several dataclasses could take them."""

    def build(self, kind: type[T], **more: Any) -> T:
        """An instance of one of them; flags that were not given keep its defaults, and flags of others are passed over.

        Args:
            kind: the dataclass.
            more: fields that are no flags, or that win over them.
        """
        return kind(**{item.field: self[item.key] for item in flags_of(kind) if item.key in self} | more)

    def without(self, *kinds: type) -> list[str]:
        """The keys of given flags that none of these dataclasses has."""
        return sorted(self.keys() - {item.key for kind in kinds for item in flags_of(kind)})

    def require(self, kinds: Iterable[type], holding: Mapping[str, bool]) -> None:
        """As :func:`require`, for flags of these dataclasses."""
        for item, _ in _distinct(kinds).values():
            if item.key in self and item.flag.requires and not holding[item.flag.requires]:
                raise requirement_error(item.name, self[item.key], item.flag.requires)


def require(arguments: object, holding: Mapping[str, bool]) -> None:
    """Raise ConfigError for a flag that is not at its default although what it requires does not hold.

    Args:
        arguments: an instance of a dataclass of flags.
        holding: every ``Flag.requires`` of it, and whether it is met.
    """
    for item in flags_of(type(arguments)):
        value = getattr(arguments, item.field)
        if item.flag.requires and not holding[item.flag.requires] and value != item.value:
            raise requirement_error(item.name, value, item.flag.requires)


def command(app: typer.Typer, name: str | None = None, *, either: tuple[type, ...] = ()) -> Callable[[Body], Body]:
    """Add a command to ``app``: its parameters that are dataclasses become flags, in their order.

    A parameter of type :class:`Given` gets what was given of the flags of ``either``.

    Args:
        app: what the command is added to.
        name: of a sub-command; None for an app of one command.
        either: dataclasses of which the body builds one, depending on what is asked for. Flags of one name are one flag.
    """

    def decorate(body: Body) -> Body:
        entry, flags = _entry(body, either, is_root=name is None)
        app.command(name, cls=command_class(flags), context_settings=SETTINGS)(entry)
        return body

    return decorate


def callback(app: typer.Typer, *, either: tuple[type, ...] = (), alone: bool = True) -> Callable[[Body], Body]:
    """As :func:`command`, for what ``app`` does without a sub-command.

    Args:
        app: what it is added to.
        either: as for :func:`command`.
        alone: whether it can be called without a sub-command; otherwise it only describes the app.
    """

    def decorate(body: Body) -> Body:
        entry, flags = _entry(body, either, is_root=True, alone=alone)
        app.callback(
            cls=group_class(flags), invoke_without_command=alone, no_args_is_help=not alone, context_settings=SETTINGS
        )(entry)
        return body

    return decorate


def _entry(body: Body, either: tuple[type, ...], *, is_root: bool, alone: bool = True) -> tuple[Body, Flags]:
    """What typer calls, with a parameter for every flag, and the flags; it calls ``body`` with instances."""
    hints = {name: kind for name, kind in get_type_hints(body).items() if name != "return"}
    kinds = {name: kind for name, kind in hints.items() if kind is not Given}
    chosen = _distinct(either).keys()
    items = {
        key: (replace(item, value=None), kind) if key in chosen and item.value is MISSING else (item, kind)
        for key, (item, kind) in _distinct((*kinds.values(), *either, *((Common,) if alone else ()))).items()
    }

    def entry(**values: Any) -> None:
        context: typer.Context = values.pop(CONTEXT)
        values.pop("config", None)
        is_printed = values.pop(PRINT_CONFIG, False)
        if context.invoked_subcommand:
            return
        given = {key: _checked(item, values[key]) for key, (item, _) in items.items()}
        present = Given({key: given[key] for key in chosen if given[key] is not None})
        names = {
            each: item.name
            for key, (item, _) in items.items()
            if _was_given(context, key)
            for each in (item.field, key)
        }
        with _flags_named(names):
            made = {name: present if kind is Given else _instance(kind, given, context) for name, kind in hints.items()}
        if is_printed:
            typer.echo(
                flags_as_yaml({item.name: given[key] for key, (item, _) in items.items() if _was_given(context, key)}),
                nl=False,
            )
            return
        with _flags_named(names):
            body(**made)

    parameters = [parameter(item, kind, unset=key in chosen) for key, (item, kind) in items.items()]
    entry.__signature__ = inspect.Signature([*general_parameters(is_root, alone), *parameters])  # type: ignore[attr-defined]
    entry.__annotations__ = {}  # typer reads both
    entry.__name__, entry.__doc__ = body.__name__, body.__doc__
    return entry, items


@contextmanager
def _flags_named(names: Mapping[str, str]) -> Iterator[None]:
    """Errors about a field of a library's arguments name the flag that it was given by.

    Args:
        names: field or key -> flag.
    """
    try:
        yield
    except MedusaExportError as error:
        error.where = names.get(error.where, error.where)
        raise


def _was_given(context: typer.Context, key: str) -> bool:
    """On the command line or in a file of flags."""
    source = context.get_parameter_source(key)
    return source is not None and source.name != "DEFAULT"


def _distinct(kinds: Iterable[type]) -> Flags:
    """The flags of several dataclasses by key, each with its field's type; of those with one name, the first."""
    found: dict[str, tuple[FlagField, Any]] = {}
    for kind in kinds:
        hints = get_type_hints(kind)
        for item in flags_of(kind):
            found.setdefault(item.key, (item, hints[item.field]))
    return found


def _checked(item: FlagField, value: Any) -> Any:
    """The value, of a flag that may be repeated a tuple.

    Raises:
        ConfigError: one that is not among the flag's choices, or out of its bounds.
    """
    if isinstance(value, list):
        return tuple(_checked(item, each) for each in value)
    choices = item.flag.choices
    if value is not None and choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        action = f"did you mean {near[0]}?" if near else "choose one of them"
        raise ConfigError(item.name, repr(value), f"one of {', '.join(choices)}", action)
    item.require(value)
    return value


def _instance(kind: type[T], given: Mapping[str, Any], context: typer.Context) -> T:
    """The dataclass from the values of all flags.

    Raises:
        ConfigError: a flag without a default was not given, or the dataclass refuses a value.
    """
    values: dict[str, Any] = {}
    for item in flags_of(kind):
        value = given[item.key]
        if value is None and item.flag.derive is not None:
            value = item.flag.derive(given)
        elif value is None and item.value is MISSING:
            expected = f"a value ({item.flag.help.split('. ')[0].rstrip('.')})"
            raise ConfigError(item.name, "nothing", expected, f"see {context.command_path} --help")
        values[item.field] = item.value if value is None else value
    return kind(**values)
