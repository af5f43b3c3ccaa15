"""Writes a safetensors file one tensor at a time: the header comes from a plan, so only one tensor is in memory.

The format: an unsigned 64-bit little-endian header length, the header as JSON padded with spaces to a multiple of 8,
then the tensors' bytes, row major, without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import torch

from medusa_export.core.artifacts.hashing import WrittenFile
from medusa_export.core.errors import InternalError, OutputError
from medusa_export.core.threads import Follower

ALIGNMENT = 8
BACKLOG = 8  # chunks that wait for their hash
RELEASE_BYTES = 64 << 20
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int64: "I64",
}


class Entry(Protocol):
    """What the writer needs to know of a tensor; a ``TensorPlan`` is one."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


_Planned = TypeVar("_Planned", bound=Entry)


class SafetensorsWriter(Generic[_Planned]):
    """A context manager: ``write`` every entry once, in the order of :attr:`entries`.

    The same entries and tensors always give the same bytes. The file has its final length from the beginning, and is hashed
    while it is written.

    Args:
        path: the file to create.
        entries: the tensors to come. Wider dtypes are stored first, so that every tensor is aligned to its own size.
        metadata: strings for the header's ``__metadata__``.

    Raises:
        InternalError: an entry twice, a tensor that does not match its entry, or entries left unwritten.
        OutputError: a full disk.
    """

    def __init__(self, path: Path, entries: Sequence[_Planned], metadata: Mapping[str, str] | None = None) -> None:
        self.path = path
        self.entries = sorted(entries, key=lambda entry: -_torch_dtype(entry).itemsize)
        self._header = _header(path, self.entries, metadata or {})
        self._size = len(self._header) + sum(math.prod(e.shape) * _torch_dtype(e).itemsize for e in self.entries)
        self._next, self._told = 0, (0, 0)
        self._hash, self._follower = hashlib.sha256(), Follower(BACKLOG)

    def __enter__(self) -> SafetensorsWriter[_Planned]:
        try:
            self._file = self.path.open("wb", buffering=0)
        except OSError as error:
            raise self._failed(error) from error
        self._put(self._header)
        try:
            self._file.truncate(self._size)
        except OSError as error:
            self.__exit__(type(error), error, None)
            raise self._failed(error) from error
        return self

    @property
    def written(self) -> WrittenFile:
        """Size and hash, once the body has ended."""
        return WrittenFile(self._size, self._hash.hexdigest())

    def follow(self, task: Callable[..., object], *arguments: Any) -> None:
        """Run a task on another thread behind what was written so far, tasks in their order; what it raises ends the body."""
        self._follower.submit(task, *arguments)

    def write(self, chunks: torch.Tensor | Iterable[torch.Tensor]) -> None:
        """The next entry's bytes: the tensor, or chunks of its rows."""
        if self._next == len(self.entries):
            raise InternalError(str(self.path), "one tensor too many", f"{self._next}")
        entry, rows, shape = self.entries[self._next], 0, list[int]()
        for chunk in [chunks] if isinstance(chunks, torch.Tensor) else chunks:
            rows += chunk.shape[0] if chunk.ndim else 1
            shape = [rows, *chunk.shape[1:]] if chunk.ndim else []
            fits = chunk.dtype == _torch_dtype(entry) and shape[1:] == list(entry.shape[1:])
            if not fits or rows > math.prod(entry.shape[:1]):
                raise self._disagree(entry, chunk.dtype, shape)
            self._put(chunk.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if shape != list(entry.shape):
            raise self._disagree(entry, _torch_dtype(entry), shape)
        self._next += 1
        self.follow(self._release, self._file.tell())

    def _disagree(self, entry: Entry, dtype: torch.dtype, shape: list[int]) -> InternalError:
        return InternalError(f"{self.path}: {entry.name}", f"{dtype} {shape}", f"{entry.dtype} {list(entry.shape)}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._follower.__exit__(kind, error, traceback)
        finally:
            self._close()
        if kind is None and self._next < len(self.entries):
            left = self.entries[self._next].name
            raise InternalError(str(self.path), f"no {left}", "every entry written")

    def _release(self, stop: int) -> None:
        """Have the kernel begin to write, and drop from its cache what it wrote since it was told so the last time.

        Otherwise an output of the size of the memory pushes out the sources, which other ranks read again.
        """
        if stop - self._told[-1] < RELEASE_BYTES and stop < self._size:
            return
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), self._told[0], stop - self._told[0], os.POSIX_FADV_DONTNEED)
        self._told = (self._told[-1], stop)

    def _close(self) -> None:
        try:
            self._file.close()
        except OSError as failure:
            raise self._failed(failure) from failure

    def _put(self, data: bytes | memoryview) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self._failed(error) from error
        self.follow(self._hash.update, data)

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(
            str(self.path), str(error), "a writable disk with room", "free some space or pick another path"
        )


def _torch_dtype(entry: Entry) -> torch.dtype:
    dtype = getattr(torch, entry.dtype, None)
    if dtype not in DTYPE_NAMES:
        known = ", ".join(str(known).removeprefix("torch.") for known in DTYPE_NAMES)
        raise InternalError(entry.name, f"dtype {entry.dtype}", f"one of {known}")
    return dtype


def _header(path: Path, entries: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    body: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for entry in entries:
        if entry.name in body:
            raise InternalError(f"{path}: {entry.name}", "it twice", "every name once")
        dtype = _torch_dtype(entry)
        stop = start + math.prod(entry.shape) * dtype.itemsize
        body[entry.name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(entry.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(body, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
