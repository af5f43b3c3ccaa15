"""Inputs and outputs of the Triton models in one table, from which configurations, parsing and answers follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medusa_export.core.errors import ConfigError

Array = npt.NDArray[Any]
Value = str | int | float | bool | list[str]

DTYPES: dict[str, Any] = {
    "TYPE_STRING": np.object_,
    "TYPE_INT64": np.int64,
    "TYPE_INT32": np.int32,
    "TYPE_FP32": np.float32,
    "TYPE_BOOL": np.bool_,
}


@dataclass(frozen=True)
class Port:
    """One input or output.

    Attributes:
        dims: (1,) for one value, (-1,) for a list.
        is_optional: for inputs; an absent one has the value that the server's options say.
    """

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)
    is_optional: bool = True

    def as_config(self) -> dict[str, Any]:
        """The fields of ModelInput or ModelOutput."""
        config: dict[str, Any] = {"name": self.name, "data_type": self.data_type, "dims": list(self.dims)}
        return config | ({"optional": True} if self.is_optional else {})


# 64 bits for what a client may get wrong: /generate wraps numbers at the width of the tensor without a word.
INPUTS = (
    Port("text_input", "TYPE_STRING", is_optional=False),
    Port("system", "TYPE_STRING"),
    Port("chat", "TYPE_BOOL"),
    Port("max_tokens", "TYPE_INT64"),
    Port("temperature", "TYPE_FP32"),
    Port("top_p", "TYPE_FP32"),
    Port("seed", "TYPE_INT64"),
    Port("stop", "TYPE_STRING", dims=(-1,)),
    Port("stream", "TYPE_BOOL"),
    Port("timeout_s", "TYPE_FP32"),
)
OUTPUTS = (
    Port("text_output", "TYPE_STRING", is_optional=False),
    Port("token_ids", "TYPE_INT32", dims=(-1,), is_optional=False),
    Port("finish_reason", "TYPE_STRING", is_optional=False),
    Port("prompt_tokens", "TYPE_INT32", is_optional=False),
    Port("completion_tokens", "TYPE_INT32", is_optional=False),
    Port("tokens_per_step", "TYPE_FP32", is_optional=False),
)


def read_inputs(arrays: Mapping[str, Array], parameters: Iterable[str] = ()) -> dict[str, Value]:
    """The values of a request's tensors, by name.

    Args:
        parameters: names of the request's parameters: where ``/generate`` puts what is no input, a misspelt one for instance.

    Raises:
        ConfigError: an unknown name, another type, another number of values, or bytes that are no UTF-8.
    """
    known = {port.name: port for port in INPUTS}
    if unknown := sorted({*arrays, *parameters} - known.keys()):
        raise ConfigError("input", unknown[0], f"one of {', '.join(known)}", "correct the request")
    missing = [port.name for port in INPUTS if not port.is_optional and port.name not in arrays]
    if missing:
        raise ConfigError(missing[0], "nothing", "one string", "add it to the request")
    return {name: _value(known[name], array) for name, array in arrays.items()}


def write_outputs(values: Mapping[str, Any]) -> dict[str, Array]:
    """Tensors of an answer, by name: every output has its value in ``values``."""
    arrays = {}
    for port in OUTPUTS:
        value = values[port.name]
        listed = list(value) if port.dims == (-1,) else [value]
        encoded = [item.encode() for item in listed] if port.data_type == "TYPE_STRING" else listed
        arrays[port.name] = np.array(encoded, dtype=DTYPES[port.data_type])
    return arrays


def _value(port: Port, array: Array) -> Value:
    expected = DTYPES[port.data_type]
    if array.dtype != expected:
        got, name = f"{array.dtype}", port.data_type.removeprefix("TYPE_")
        raise ConfigError(port.name, got, f"a tensor of {name}", "correct the request")
    values = array.reshape(-1).tolist()
    if port.data_type == "TYPE_STRING":
        values = [_text(port.name, value) for value in values]
    if port.dims == (-1,):
        return values
    if len(values) != 1:
        raise ConfigError(port.name, f"{len(values)} values", "one", "correct the request")
    value: Value = values[0]
    return value


def _text(name: str, value: object) -> str:
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise ConfigError(name, "bytes that are no UTF-8", "text", "encode it as UTF-8") from error
