"""Where weights can be read from by Hugging Face name, and two such places compared, number by number, some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from medusa_export.core.threads import StopPoint, run_torch
from medusa_export.exporter.verify.comparison import ROUNDING
from medusa_export.exporter.verify.dequantize import BoundedRows
from medusa_export.exporter.verify.rebuild import CHUNK_VALUES, Rebuilt, layout, open_ranks
from medusa_export.exporter.verify.trtllm_loader.config import read_config
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint

Shape = tuple[int, ...]


class Numbers(Protocol):
    """Weights by name; quantized ones come with their rounding error.

    Attributes:
        is_source: these are what the export was made from, in full; others may have been cast already.
    """

    is_source: bool

    def __contains__(self, name: object) -> bool: ...

    def shape(self, name: str) -> Shape:
        """Shape of the Hugging Face tensor."""

    def rows(self, name: str, start: int, stop: int) -> BoundedRows:
        """Rows ``start .. stop - 1``.  # [stop - start, ...]

        Args:
            name: Hugging Face name of a tensor.
            start: first row.
            stop: behind the last row.
        """


class SourceNumbers:
    """The checkpoint and heads that an export was made from."""

    is_source = True

    def __init__(self, checkpoint: MedusaCheckpoint) -> None:
        self.checkpoint = checkpoint
        self._names = frozenset(checkpoint.names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def shape(self, name: str) -> Shape:
        return self.checkpoint.shape(name)

    def rows(self, name: str, start: int, stop: int) -> BoundedRows:
        """As :meth:`Numbers.rows`."""
        return BoundedRows(self.checkpoint.read_rows(name, start, stop))


class RankNumbers:
    """The rank files of a TensorRT-LLM checkpoint: what other files of the same export are compared with where the source is away."""

    is_source = False

    def __init__(self, trt_dir: Path) -> None:
        config: dict[str, Any] = read_config(trt_dir)
        self._items: dict[str, Rebuilt] = {item.name: item for item in layout(config, open_ranks(trt_dir, config))}

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def shape(self, name: str) -> Shape:
        return self._items[name].shape

    def rows(self, name: str, start: int, stop: int) -> BoundedRows:
        """As :meth:`Numbers.rows`."""
        return _joined(list(_lines(self._items[name], start, stop)), dim=0)


def _lines(item: Rebuilt, start: int, stop: int) -> Iterator[BoundedRows]:
    """The rows of every line of the grid that the range reaches into."""
    first = 0
    for line in item.grid:
        low, high = max(start - first, 0), min(stop - first, line[0].height)
        if low < high:
            yield _joined([piece.stored.rows(piece.start + low, piece.start + high) for piece in line], dim=-1)
        first += line[0].height


def _joined(parts: list[BoundedRows], *, dim: int) -> BoundedRows:
    if len(parts) == 1:
        return parts[0]
    values = torch.cat([part.values for part in parts], dim=dim)
    if parts[0].absolute is None:
        return BoundedRows(values)
    absolute = [torch.broadcast_to(part.absolute, part.values.shape) for part in parts if part.absolute is not None]
    return BoundedRows(values, parts[0].relative, torch.cat(absolute, dim=dim))


class Weight(Protocol):
    """A matrix or vector that a written file holds."""

    @property
    def name(self) -> str:
        """Its Hugging Face name."""

    @property
    def shape(self) -> Shape:
        """Shape in Hugging Face's orientation."""

    def rows(self, start: int, stop: int) -> BoundedRows:
        """Rows in Hugging Face's orientation."""

    def row_numbers(self, start: int, stop: int) -> torch.Tensor | None:
        """Which rows of the Hugging Face tensor they are; None: the same."""


def value_problems(weight: Weight) -> Iterator[str]:
    """What a weight cannot be by itself: not finite, or all zero; some rows at a time."""
    step, is_zero = max(2, CHUNK_VALUES // max(1, math.prod(weight.shape[1:])) // 2 * 2), True
    for start in range(0, weight.shape[0], step):
        values = weight.rows(start, min(start + step, weight.shape[0])).values.to(torch.float32)
        if not bool(torch.isfinite(values).all()):
            yield "values that are not finite"
            return
        is_zero = is_zero and not bool(values.any())
    if is_zero:
        yield "zero"


def weight_differences(weights: Iterable[Weight], numbers: Numbers, other: str) -> list[str]:
    """What of the weights is not what ``numbers`` has, a line a tensor.

    Args:
        other: what the numbers are, for the message: "the source's".
    """
    listed = list(weights)

    def compare(index: int, stop_point: StopPoint) -> str | None:
        return _difference(listed[index], numbers, other, stop_point)

    return [line for line in run_torch(compare, range(len(listed))) if line]


def _difference(weight: Weight, numbers: Numbers, other: str, stop_point: StopPoint) -> str | None:
    owner = other.removesuffix("'s").removeprefix("those of ")
    if weight.name not in numbers:
        return f"{weight.name}: {owner} has no such tensor"
    expected = numbers.shape(weight.name)
    picked = weight.row_numbers(0, min(1, weight.shape[0])) is not None
    if weight.shape[1:] != expected[1:] or (weight.shape != expected and not picked):
        return f"{weight.name}: shape {list(weight.shape)}, {owner} has {list(expected)}"
    wrong, noise, energy = 0, 0.0, 0.0
    step = max(2, CHUNK_VALUES // max(1, math.prod(weight.shape[1:])) // 2 * 2)
    for start in range(0, weight.shape[0], step):
        stop_point()
        stop = min(start + step, weight.shape[0])
        which = weight.row_numbers(start, stop)
        if which is None:
            theirs = numbers.rows(weight.name, start, stop)
        elif bool(((which < 0) | (which >= expected[0])).any()):
            return f"{weight.name}: a row that {owner} does not have"
        else:
            theirs = _joined([numbers.rows(weight.name, int(row), int(row) + 1) for row in which], dim=0)
        found = _unequal(weight.rows(start, stop), theirs, numbers.is_source)
        wrong, noise, energy = wrong + found[0], noise + found[1], energy + found[2]
    if not wrong:
        return None
    relative = math.sqrt(noise / max(energy, 1e-30))
    return f"{weight.name}: {wrong} of {math.prod(weight.shape)} values are not {other} (relative error {relative:.3g})"


def _unequal(ours: BoundedRows, theirs: BoundedRows, is_source: bool) -> tuple[int, float, float]:
    """Values that differ by more than both were rounded; squares of the differences and of their values, summed."""
    left, right = ours.values, theirs.values
    if ours.absolute is None and theirs.absolute is None:
        dtype = left.dtype if is_source else right.dtype
        left, right = left.to(dtype), right.to(dtype)
        if torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)):
            return 0, 0.0, 0.0
    limit = torch.zeros(())
    if (
        not is_source and theirs.absolute is None
    ):  # a float32 source was rounded to them, and ours were made of the source
        limit = torch.finfo(right.dtype).eps * right.to(torch.float32).abs()
    left, right = left.to(torch.float32), right.to(torch.float32)
    error = (left - right).abs_()
    for rows, values in ((ours, left), (theirs, right)):
        if rows.absolute is not None:
            limit = limit + ROUNDING * (rows.relative * values.abs() + rows.absolute)
    wrong = error.numel() - int((error <= limit).sum())
    return wrong, float(error.square().sum()), float(right.square().sum())
