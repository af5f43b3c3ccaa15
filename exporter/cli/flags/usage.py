"""What is wrong with a command line, as the project's one line instead of the parser's box."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

from medusa_export.core.errors import ConfigError
from medusa_export.core.flags import FlagField

# Typer brings its own copy of click in some versions: the class is taken from where typer has it.
ParserError: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
HELP = "NoArgsIsHelpError"  # of a bare group of commands, whose help is printed; in some versions of click only
NUMBERS = {int: "an integer", float: "a number"}


@contextmanager
def usage_errors(context: Any) -> Iterator[None]:
    """Around what reads a command line: the parser's errors become ConfigErrors, and a value from a file names the file."""
    try:
        yield
    except ParserError as error:
        if type(error).__name__ == HELP:
            raise
        raise _in_one_line(error, getattr(error, "ctx", None) or context) from error
    except ConfigError as error:
        name = error.where.lstrip("-").replace("-", "_")
        if name in (context.default_map or {}) and _comes_from_file(context, name):
            where = f"{context.params.get('config')}: {error.where}"
            raise ConfigError(where, error.got, error.expected, error.action) from error
        raise


def number_parser(item: FlagField, kind: type) -> Callable[[Any], Any]:
    """What reads the value of a flag that takes numbers.

    Raises:
        ConfigError: by the function that is returned, which names the flag and the value.
    """

    def read(value: Any) -> Any:
        try:
            number = kind(value)
            if isinstance(value, bool) or (kind is int and isinstance(value, float) and number != value):
                raise ValueError("YAML's true, or 2.5")
            return number
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(item.name, repr(value), NUMBERS[kind], "correct it") from error

    return read


def unknown_command(context: Any, name: str, commands: Any) -> ConfigError:
    """The error for a sub-command that there is not.

    Args:
        context: the parser's.
        name: what was given.
        commands: those that there are.
    """
    near = difflib.get_close_matches(name, commands, n=1)
    action = f"did you mean {near[0]}?" if near else f"see {context.command_path} --help"
    return ConfigError(name, "an unknown command", f"one of {', '.join(commands)}", action)


def _in_one_line(error: Any, context: Any) -> ConfigError:
    see = f"see {context.command_path} --help"
    parameter: Any = getattr(error, "param", None)
    option: Any = getattr(error, "option_name", None)
    if hasattr(error, "possibilities"):
        near = difflib.get_close_matches(option, _options(context), n=1)
        action = f"did you mean {near[0]}?" if near else see
        return ConfigError(option, "an unknown flag", f"flags of {context.command_path}", action)
    message = error.message.strip().rstrip(".").removeprefix("Got ") or "nothing"
    said = message[0].lower() + message[1:]
    if option is not None:  # the only ones that are misused: without a value, or with one too many
        got, expected = ("no value", "one") if "requires" in said else ("a value", "none")
        return ConfigError(option, got, expected, see)
    if parameter is None:
        return ConfigError(context.command_path, said.replace("argument(s)", "arguments"), "what --help shows", see)
    name = _name(parameter)
    given = (context.default_map or {}).get(parameter.name)
    if given is not None and _comes_from_file(context, parameter.name):
        where = f"{context.params.get('config')}: {name}"
        return ConfigError(where, repr(given), "a value that the flag takes", f"correct it; {see}")
    return ConfigError(name, said, "a value that the flag takes", see)


def _comes_from_file(context: Any, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "DEFAULT_MAP"


def _options(context: Any) -> list[str]:
    return [name for each in context.command.params for name in (*each.opts, *each.secondary_opts) if name[:1] == "-"]


def _name(parameter: Any) -> str:
    """``--max-length``; of an argument, its metavar."""
    named = next((name for name in parameter.opts if name.startswith("--")), None)
    return named or parameter.metavar or str(parameter.name).upper()
