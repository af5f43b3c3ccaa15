"""A command's flags from a YAML file, and as one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from medusa_export.core.errors import ConfigError
from medusa_export.core.regular_files import ABSENT, found_instead


def read_flags(context: typer.Context, path: Path | None) -> Path | None:
    """Take what the file says for flags that the command line does not have: the callback of an eager option.

    Keys are flags without their dashes in front, ``num-heads`` or ``num_heads``.

    Raises:
        ConfigError: an unreadable file, no mapping, or a key that is no flag of the command.
    """
    if path is None:
        return None
    flags = {name.replace("-", "_"): value for name, value in _mapping(path).items()}
    known: dict[str, str] = {}
    opposites: dict[str, str] = {}
    for parameter in context.command.params:
        known |= {_key(option): str(parameter.name) for option in (*parameter.opts, str(parameter.name))}
        opposites |= {_key(option): str(parameter.name) for option in parameter.secondary_opts}
    values = {known[name]: value for name, value in flags.items() if name in known}
    values |= {opposites[name]: not value for name, value in flags.items() if name in opposites}
    for name in flags.keys() - known.keys() - opposites.keys():
        near = difflib.get_close_matches(name, (*known, *opposites), n=1)
        action = f"did you mean {near[0]}?" if near else f"see {context.command_path} --help"
        raise ConfigError(str(path), f"the key {name}", f"flags of {context.command_path}", action)
    context.default_map = {**(context.default_map or {}), **values}
    return path


def flags_as_yaml(flags: Mapping[str, Any]) -> str:
    """The text of such a file.

    Args:
        flags: ``--max-length`` or, of an argument without a name, ``OUT`` -> value.
    """
    import yaml

    plain = {name.lstrip("-").lower(): _plain(value) for name, value in flags.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True) if plain else ""


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _key(option: str) -> str:
    return option.lstrip("-").replace("-", "_")


def _mapping(path: Path) -> dict[str, Any]:
    import yaml

    kind = found_instead(path)
    if kind is not None:
        got = "no such file" if kind == ABSENT else kind
        raise ConfigError(str(path), got, "a YAML file with flags", "check the path")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(str(path), f"no readable YAML ({error})", "flags and their values", "correct it") from error
    if found is None:  # an empty file, as --print-config writes where no flag was given
        return {}
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ConfigError(str(path), "no mapping", "flags and their values", "write one flag a line, name: value")
    return found
