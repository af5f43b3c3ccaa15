"""--help: flags under their headings, each on a line of its own with its choices, what it means below; 80 columns are enough."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, ClassVar, get_args, get_origin

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from medusa_export.core.flags import FlagField
from medusa_export.exporter.cli.flags.usage import unknown_command, usage_errors

Flags = Mapping[str, tuple[FlagField, Any]]  # by key, with the field's type
WIDEST, INDENT = 100, 6  # columns
GENERAL = "General"  # the last heading
TYPES = {Path: "PATH", int: "INT", float: "NUMBER", str: "TEXT"}


class _Page:
    """Prints the flags of a command. Classes that :func:`command_class` makes have its ``flags``."""

    flags: ClassVar[Flags] = {}

    def parse_args(self: Any, ctx: Any, args: list[str]) -> list[str]:
        with usage_errors(ctx):
            return super().parse_args(ctx, args)  # type: ignore[misc]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        console = Console(highlight=False)
        console.width = min(console.width, WIDEST)
        for part in self.parts(ctx, console.width):
            console.print(part)

    def parts(self: Any, ctx: Any, width: int) -> Iterator[RenderableType]:
        """What the page has, from top to bottom."""
        yield Text(f"Usage: {' '.join([ctx.command_path, *self.collect_usage_pieces(ctx)])}")
        for paragraph in inspect.cleandoc(self.help or "").split("\n\n"):
            yield ""
            yield Padding(Text(paragraph.replace("\n", " ")), (0, 0, 0, 2), expand=False)
        headings: dict[str, list[RenderableType]] = {}
        last: list[RenderableType] = []
        for param in self.get_params(ctx):
            item, kind = self.flags.get(param.name, (None, None))
            head, body = _described(item, kind) if item else _general(param)
            heading = headings.setdefault(item.flag.panel, []) if item and item.flag.panel else last
            heading += [
                Text("\n".join(_wrapped(head, width)), style="bold"),
                Padding(body, (0, 0, 0, INDENT), expand=False),
            ]
        for name, rows in {**headings, GENERAL: last, "Commands": _commands(self, ctx)}.items():
            if rows:
                yield Text(f"\n{name}", style="bold underline")
                yield Group(*rows)


class _GroupPage(_Page):
    """The same of a command with sub-commands."""

    def invoke(self: Any, ctx: Any) -> Any:
        with usage_errors(ctx):
            return super().invoke(ctx)  # type: ignore[misc]

    def resolve_command(self: Any, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            raise unknown_command(ctx, args[0], self.commands)
        return super().resolve_command(ctx, args)  # type: ignore[misc]


def command_class(flags: Flags) -> type[TyperCommand]:
    """What typer makes the command of."""
    return type("Command", (_Page, TyperCommand), {"flags": flags})


def group_class(flags: Flags) -> type[TyperGroup]:
    """The same for a command with sub-commands."""
    return type("Group", (_GroupPage, TyperGroup), {"flags": flags})


def shown_default(item: FlagField) -> str:
    """The default as --help shows it; "" where there is nothing to show."""
    if item.flag.default:
        return item.flag.default
    if isinstance(item.value, bool):
        return "on" if item.value else ""
    return "" if item.value in (None, MISSING, (), "") else f"{item.value}"


def flag_head(item: FlagField, kind: Any) -> str:
    """The line of a flag: its names, what it takes, and whether it has to be given.

    Args:
        item: the flag.
        kind: its field's type.
    """
    said = item.flag
    names = " ".join([item.name, *said.aliases, *(("/", said.opposite) if said.opposite else ())])
    kinds = [get_args(kind)[0]] if get_origin(kind) is tuple else [kind, *get_args(kind)]
    value = said.metavar or (f"[{'|'.join(said.choices)}]" if said.choices else "")
    value = value or next((TYPES[each] for each in kinds if each in TYPES), "")
    is_required = item.value is MISSING and not said.derive
    return " ".join(filter(None, (names, "" if said.positional else value, "(required)" if is_required else "")))


def flag_text(item: FlagField) -> str:
    """What it means, what it requires, and its default."""
    default = shown_default(item)
    requires = f" Requires {item.flag.requires}." if item.flag.requires else ""
    return item.flag.help + requires + (f" [default: {default}]" if default else "")


def _described(item: FlagField, kind: Any) -> tuple[str, RenderableType]:
    """The line of a flag, and what stands below it."""
    head, body = flag_head(item, kind), Text(flag_text(item))
    described = {name: text for name, text in item.flag.choices.items() if text}
    if not described:
        return head, body
    table = Table.grid(padding=(0, 2))
    for name, text in described.items():
        table.add_row(Text(name, style="bold", no_wrap=True), Text(text))
    return head, Group(body, Padding(table, (0, 0, 0, 2), expand=False))


def _wrapped(head: str, width: int) -> list[str]:
    """The line of a flag, broken between choices where it is too long."""
    lines = textwrap.wrap(head.replace("|", "| "), width - 4, break_long_words=False, break_on_hyphens=False)
    return [f"{'  ' if line is lines[0] else ' ' * INDENT}{line.replace('| ', '|')}" for line in lines]


def _general(param: Any) -> tuple[str, RenderableType]:
    """As :func:`_described`, for what is no field: --config, --version, --help."""
    names = sorted(param.opts, key=lambda name: not name.startswith("--"))
    return " ".join([*names, *filter(None, [getattr(param, "metavar", None)])]), Text(param.help or "")


def _commands(group: Any, ctx: Any) -> list[RenderableType]:
    """A line for each sub-command."""
    table = Table.grid(padding=(0, 2))
    commands = getattr(group, "commands", {})
    for name, command in commands.items():
        summary = inspect.cleandoc(command.help or "").split("\n\n")[0].replace("\n", " ")
        table.add_row(Text(f"  {name}", style="bold", no_wrap=True), Text(summary))
    return [table] if commands else []
