"""config.pbtxt: written, read as Triton reads it, and compared with what was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from medusa_export.core.errors import ConfigError, missing_package

CONFIG_FILE = "config.pbtxt"
_LONGEST = 120  # characters of a value in a message


def render(config: dict[str, Any]) -> str:
    """A configuration as config.pbtxt.

    Raises:
        MissingPackageError: no tritonclient, which knows the fields.
    """
    text: str = _protobuf()[1].MessageToString(_message(config))
    return text


def parse(path: Path) -> Any:
    """A configuration, as Triton reads it.

    Raises:
        ConfigError: no such file, an unknown field, or a value of another type.
        MissingPackageError: no tritonclient, which knows the fields.
    """
    text_format = _protobuf()[1]
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), _message({}))
    except OSError as error:
        raise ConfigError(str(path), f"{error.strerror}", "a model configuration", "write it again") from error
    except (UnicodeDecodeError, text_format.ParseError) as error:
        got = f"no model configuration ({error})"
        raise ConfigError(str(path), got, "what Triton reads", "write it again") from error


def text_parameters(found: Any) -> dict[str, str]:
    """The parameters of a configuration."""
    return {name: value.string_value for name, value in found.parameters.items()}


def differences(
    found: Any,
    config: dict[str, Any],
    fault_of: Callable[[str, str | None], str],
    field_faults: Mapping[str, Callable[[Any], str]],
) -> list[str]:
    """How a configuration differs from the one that was written, a line each.

    Args:
        found: see :func:`parse`.
        config: what was written.
        fault_of: what is wrong with a parameter's value, or with its absence; nothing where it is as good as what was written.
        field_faults: the same of other fields; of one that is not among them nothing is said.
    """
    wanted, lines = _message(config), list[str]()
    for field in wanted.DESCRIPTOR.fields:
        got, want = getattr(found, field.name), getattr(wanted, field.name)
        # An empty dynamic_batching { } equals an absent one, and yet turns it on.
        is_there, was_there = (field.has_presence and each.HasField(field.name) for each in (found, wanted))
        if (got, is_there) == (want, was_there):
            continue
        if field.name == "parameters":
            lines += _parameter_lines(text_parameters(found), text_parameters(wanted), fault_of)
        elif field.name in ("input", "output"):
            lines += _by_name(field.name, got, want)
        else:
            judge = field_faults.get(field.name)
            told = _told(got) if got != want else "{ }" if is_there else "nothing"
            lines.append(_line(field.name, told, _told(want)) + (_verdict(judge(found)) if judge else ""))
    return lines


def _parameter_lines(
    got: dict[str, str], want: dict[str, str], fault_of: Callable[[str, str | None], str]
) -> Iterator[str]:
    for name in sorted(got.keys() | want.keys()):
        if got.get(name) != want.get(name):
            told = (repr(values[name]) if name in values else "nothing" for values in (got, want))
            yield _line(f"parameter {name}", *told) + _verdict(fault_of(name, got.get(name)))


def _by_name(field: str, got: Any, want: Any) -> Iterator[str]:
    """Of a list of inputs or outputs."""
    found, wanted = ({item.name: item for item in items} for items in (got, want))
    lines = [
        _line(f"{field} {name}", _told(found.get(name)), _told(wanted.get(name)))
        for name in dict.fromkeys((*wanted, *found))
        if found.get(name) != wanted.get(name)
    ]
    yield from lines or [_line(field, "another order", "as the table has it")]


def _verdict(fault: str) -> str:
    return f"; wrong: {fault}" if fault else "; changed, and valid"


def _line(where: str, got: str, want: str) -> str:
    return f"{where}: got {got[:_LONGEST]}; written was {want[:_LONGEST]}"


def _told(value: Any) -> str:
    """A field's value on one line."""
    if isinstance(value, (str, int, float)):
        return f"{value}"
    if value is None:
        return "nothing"
    items = [value] if hasattr(value, "DESCRIPTOR") else list(value)
    text = "; ".join(_protobuf()[1].MessageToString(item, as_one_line=True).strip() for item in items)
    return text or "nothing"


def _message(config: dict[str, Any]) -> Any:
    json_format, _, model_config = _protobuf()
    return json_format.ParseDict(config, model_config.ModelConfig())


def _protobuf() -> tuple[Any, Any, Any]:
    try:
        from google.protobuf import json_format, text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise missing_package("tritonclient", "triton") from error
    return json_format, text_format, model_config_pb2
