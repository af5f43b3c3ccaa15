"""An ONNX file with its constants left on the disk: mapped, and read where they are asked for."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto

from medusa_export.core.errors import CheckpointError

NIBBLES = (TensorProto.UINT4, TensorProto.INT4, TensorProto.FLOAT4E2M1)  # two values a byte
_DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    **dict.fromkeys(NIBBLES, torch.uint8),
}


@dataclass(frozen=True)
class Constant:
    """One initializer.

    Attributes:
        stored: as in the file, two values a byte where they have 4 bits.  # flat
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    stored: torch.Tensor

    @property
    def has_nibbles(self) -> bool:
        """Whether two values share a byte."""
        return self.kind in NIBBLES

    def matrix(self) -> torch.Tensor:
        """The stored values in their shape; of 4-bit ones all codes, unpacked."""
        return (unpacked(self.stored) if self.has_nibbles else self.stored).reshape(self.shape)

    def columns(self, start: int, stop: int) -> torch.Tensor:
        """Columns of a matrix, as codes where it has 4 bits.  # [rows, stop - start]"""
        rows, width = self.shape
        if not self.has_nibbles:
            return self.stored.reshape(rows, width)[:, start:stop]
        if width % 2 == 0 and start % 2 == 0:
            part = self.stored.reshape(rows, width // 2)[:, start // 2 : -(-stop // 2)]
            return unpacked(part.contiguous()).reshape(rows, -1)[:, : stop - start]
        return self.matrix()[:, start:stop]


def unpacked(stored: torch.Tensor) -> torch.Tensor:
    """The low half of every byte comes first.  # uint8 [..., n] -> [..., 2 n]"""
    return torch.stack([stored & 0xF, stored >> 4], dim=-1).flatten(-2)


class OnnxFile:
    """A model and what its constants are.

    Raises:
        CheckpointError: no ONNX model, or constants that are not where it says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.model = onnx.load(path, load_external_data=False)
        except Exception as error:  # protobuf's errors are classes of its own
            raise _damaged(path, f"no readable ONNX model ({error})") from error
        self.graph = self.model.graph
        self.initializers = {each.name: each for each in self.graph.initializer}
        self._files: dict[str, torch.Tensor] = {}
        if len(self.initializers) != len(self.graph.initializer):
            raise _damaged(path, "two constants of one name")

    def constant(self, name: str) -> Constant:
        """One initializer."""
        proto = self.initializers.get(name)
        if proto is None:
            raise _damaged(self.path, f"no constant {name}")
        if proto.data_type not in _DTYPES:
            raise _damaged(self.path, f"{name} of ONNX type {proto.data_type}")
        shape, dtype = tuple(proto.dims), _DTYPES[proto.data_type]
        count = 1
        for size in shape:
            count *= size
        nbytes = -(-count // 2) if proto.data_type in NIBBLES else count * dtype.itemsize
        data = self._bytes(proto)
        if len(data) != nbytes:
            raise _damaged(self.path, f"{name}: {len(data)} bytes for {list(shape)}, which takes {nbytes}")
        return Constant(name, proto.data_type, shape, data.view(dtype) if nbytes else torch.empty(0, dtype=dtype))

    def value(self, name: str) -> torch.Tensor:
        """A small constant as it is."""
        return self.constant(name).matrix()

    def external(self, name: str) -> dict[str, str]:
        """Where a constant's bytes lie; empty for inline ones."""
        return {entry.key: entry.value for entry in self.initializers[name].external_data}

    @cached_property
    def producers(self) -> dict[str, onnx.NodeProto]:
        """The node that makes a value."""
        return {name: node for node in self.graph.node for name in node.output if name}

    def consumers(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that read a value."""
        return [node for node in self.graph.node if name in node.input]

    def shapes(self, values: Iterable[Any]) -> dict[str, list[int | str]]:
        """Declared shapes of inputs or outputs."""
        return {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
        }

    def _bytes(self, proto: TensorProto) -> torch.Tensor:
        if proto.data_location != TensorProto.EXTERNAL:
            return torch.frombuffer(bytearray(proto.raw_data), dtype=torch.uint8) if proto.raw_data else torch.empty(0)
        place = {entry.key: entry.value for entry in proto.external_data}
        location = place.get("location", "")
        if location != Path(location).name:
            raise _damaged(self.path, f"{proto.name}: bytes in {location!r}, which is no file beside it")
        whole = self._file(location)
        start, length = int(place.get("offset", 0)), int(place.get("length", 0))
        if start + length > len(whole):
            raise _damaged(
                self.path, f"{proto.name}: bytes up to {start + length} of {location}, which has {len(whole)}"
            )
        return whole[start : start + length]

    def _file(self, location: str) -> torch.Tensor:
        if location not in self._files:
            path = self.path.with_name(location)
            try:
                with path.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise _damaged(path, f"no readable file ({error})") from error
            self._files[location] = torch.frombuffer(mapped, dtype=torch.uint8)
        return self._files[location]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """An operator's attributes as Python values."""
    return {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(str(path), what, "a graph as it was written", "export again")
