"""A command's flags from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from medusa_export.core.errors import ConfigError, missing_package


def read_flags(context: typer.Context, path: Path | None) -> Path | None:
    """Take what the file says for flags that the command line does not have: the callback of an eager option.

    Keys are flags without their dashes in front, ``num-heads`` or ``num_heads``.

    Raises:
        ConfigError: an unreadable file, no mapping, or a key that is no flag of the command.
        MissingPackageError: PyYAML is not installed.
    """
    if path is None:
        return None
    flags = {name.replace("-", "_"): value for name, value in _mapping(path).items()}
    known = {parameter.name for parameter in context.command.params}
    opposites = {
        option.removeprefix("--").replace("-", "_"): parameter.name
        for parameter in context.command.params
        for option in parameter.secondary_opts
    }
    for name in [name for name in flags if name in opposites]:
        flags[str(opposites[name])] = not flags.pop(name)
    if unknown := sorted(flags.keys() - known):
        expected = f"flags of {context.info_name}"
        raise ConfigError(str(path), f"the key {unknown[0]}", expected, f"see {context.info_name} --help")
    context.default_map = {**(context.default_map or {}), **flags}
    return path


def _mapping(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise missing_package("pyyaml", "train") from error
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(str(path), f"no readable YAML ({error})", "flags and their values", "correct it") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ConfigError(str(path), "no mapping", "flags and their values", "write one flag a line, name: value")
    return found
