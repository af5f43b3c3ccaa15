"""What typer is told about one flag."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from medusa_export.core.flags import FlagField
from medusa_export.exporter.cli.flags.usage import NUMBERS, number_parser
from medusa_export.exporter.cli.flags.yaml_file import read_flags

CONTEXT, PRINT_CONFIG = "typer_context", "print_config"
KEYWORD = inspect.Parameter.KEYWORD_ONLY


def parameter(item: FlagField, kind: Any, *, unset: bool) -> inspect.Parameter:
    """The parameter of one flag. Typer gives None for a flag that was not given and has no default.

    Args:
        item: the flag.
        kind: its field's type.
        unset: whether it is None where it was not given, whatever the field's default.
    """
    said, default = item.flag, item.value
    completed = tuple(said.choices) or said.suggestions
    options: dict[str, Any] = {"help": said.help, "autocompletion": _completion(completed) if completed else None}
    if get_origin(kind) is tuple:
        kind, default = list[get_args(kind)[0]], list(default) if default and default is not MISSING else None  # type: ignore[misc]
    number = next((each for each in (*get_args(kind), kind) if each in NUMBERS), None)
    if number is not None:
        options["parser"] = number_parser(item, number)
    if said.positional:
        return inspect.Parameter(
            item.key, KEYWORD, annotation=Annotated[kind, typer.Argument(metavar=item.name, **options)]
        )
    declared = f"{item.name}/{said.opposite}" if said.opposite else item.name
    annotation = Annotated[kind | None, typer.Option(declared, *said.aliases, **options)]
    value = None if unset or default is MISSING else default
    return inspect.Parameter(item.key, KEYWORD, default=value, annotation=annotation)


def general_parameters(is_root: bool, takes_flags: bool) -> list[inspect.Parameter]:
    """What a command has besides its flags: the context, --config, --print-config, and of a program --version."""
    config = typer.Option(
        "--config", callback=read_flags, is_eager=True, metavar="FILE.yaml",
        help="Read flags from this YAML file, such as max-length: 512. The command line wins.",
    )  # fmt: skip
    printed = typer.Option("--print-config", help="Print the given flags as YAML for --config, and exit.")
    shown = typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    found = [
        (True, inspect.Parameter(CONTEXT, KEYWORD, annotation=typer.Context)),
        (takes_flags, inspect.Parameter("config", KEYWORD, default=None, annotation=Annotated[Path | None, config])),
        (takes_flags, inspect.Parameter(PRINT_CONFIG, KEYWORD, default=False, annotation=Annotated[bool, printed])),
        (is_root, inspect.Parameter("version", KEYWORD, default=False, annotation=Annotated[bool, shown])),
    ]
    return [each for is_wanted, each in found if is_wanted]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # late: it takes as long as all flags together

        typer.echo(f"medusa-export {version('medusa-export')}")
        raise typer.Exit


def _completion(choices: Sequence[str]) -> Callable[[str], list[str]]:
    return lambda incomplete: [choice for choice in choices if choice.startswith(incomplete)]
