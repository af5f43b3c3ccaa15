"""Lazy tensors from a Hugging Face directory or one weights file: safetensors, or pickles that are never executed.

The layouts are those that ``save_pretrained`` writes, looked for in the order in which transformers does.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PureWindowsPath

import torch
from safetensors import SafetensorError, safe_open

from medusa_export.core.errors import CheckpointError, ConfigError
from medusa_export.core.hub import WEIGHT_FILES as LAYOUTS
from medusa_export.core.json_fields import HUGGING_FACE, read_json
from medusa_export.core.regular_files import found_instead

FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")

CHUNK_VALUES = 1 << 21  # several float32 temporaries of this size cost less than one of a vocabulary projection

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
_FORBIDDEN = re.compile(r"GLOBAL ([\w.]+)")
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class _Stored:
    """One tensor's place.

    Attributes:
        name: in the file.
        offset: of its first byte in the file; None in a pickle, which has no fixed places.
        changed: when the file was last written (ns), as places hold for that file only; None is one still being written.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int | None = None
    changed: int | None = 0


@dataclass(frozen=True)
class TensorSource:
    """The tensors of a checkpoint by name, each read when it is asked for.

    For a whole tensor the file is mapped, and unmapped with the tensor; rows are copied into memory of their own, because mapping
    gigabytes to touch some rows costs more than the copy. Memory is bounded by what the caller keeps.

    Attributes:
        path: what was opened.
        files: every file that a read may touch, the index included, for hashing.
        before_read: called with the file before a matrix is read from it; vectors are too small to say where reading has come to.
    """

    path: Path
    files: tuple[Path, ...]
    _stored: Mapping[str, _Stored] = field(repr=False)
    before_read: Callable[[Path], None] = field(default=lambda file: None, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path) -> TensorSource:
        """Open a directory with model.safetensors or pytorch_model.bin (or their index), or one such file.

        Only headers are read (of a pickle: its table of contents, with ``weights_only=True``).

        Raises:
            CheckpointError: nothing there, a damaged file, or an index that does not fit its shards.
        """
        file = _weights_file(path)
        if file.name.endswith(".index.json"):
            stored = _collect(file, _read_index(file))
            files = (file, *dict.fromkeys(entry.file for entry in stored.values()))
        else:
            stored, files = _contents(file), (file,)
        if not stored:
            raise CheckpointError(str(file), "no tensors", "weights", "download or save the checkpoint again")
        return cls(path, files, stored)

    @classmethod
    def open_unfinished(cls, file: Path) -> TensorSource:
        """A safetensors file that is as long as it will be, but still being written: reads give what is there by then."""
        return cls(file, (file,), {name: replace(entry, changed=None) for name, entry in _contents(file).items()})

    def renamed(self, names: Mapping[str, str]) -> TensorSource:
        """The same tensors under other names: those of ``names`` under what it maps them to.

        Raises:
            CheckpointError: two tensors that would have one name.
        """
        stored: dict[str, _Stored] = {}
        for name, entry in self._stored.items():
            other = names.get(name, name)
            if other in stored:
                got = f"{stored[other].name} and {entry.name}, which are both {other}"
                raise CheckpointError(str(self.path), got, "each tensor once", "remove one of them from the weights")
            stored[other] = entry
        return replace(self, _stored=stored)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, in the order of the files."""
        return tuple(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._find(name).shape

    def dtype(self, name: str) -> str:
        """Dtype of one tensor by torch's name: "float16", "bfloat16", "float8_e4m3fn", "int8" ..."""
        return self._find(name).dtype

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, backed by the mapped file."""
        return self._take(name, None)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start .. stop - 1`` of the first axis.  # [stop - start, ...]

        Args:
            name: stored name of a tensor.
            start: first row.
            stop: behind the last row.
        """
        self._check_range(name, 0, start, stop)
        stored = self._find(name)
        if stored.offset is None:
            return self._take(name, slice(start, stop))
        self._announce(stored)
        return _copy_rows(stored, start, stop)

    def read_columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Columns ``start .. stop - 1`` of the second axis, a strided view.  # [rows, stop - start, ...]

        Args:
            name: stored name of a tensor.
            start: first column.
            stop: behind the last column.
        """
        self._check_range(name, 1, start, stop)
        return self._take(name, (slice(None), slice(start, stop)))

    def require(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that every named tensor is there, in 16 to 64 bit floating point, with the given shape.

        Raises:
            CheckpointError: naming the file, the tensor, what was found and what was expected.
        """
        fix_config = "check that config.json fits the weights"
        for name, shape in shapes.items():
            if name not in self._stored:
                raise CheckpointError(f"{self.path}: {name}", "no such tensor", f"shape {list(shape)}", fix_config)
            stored = self._stored[name]
            where = f"{stored.file}: {name}"
            if stored.shape != tuple(shape):
                raise CheckpointError(where, f"shape {list(stored.shape)}", f"{list(shape)}", fix_config)
            if stored.dtype not in FLOAT_DTYPES:
                floats = ", ".join(FLOAT_DTYPES)
                raise CheckpointError(where, f"dtype {stored.dtype}", f"one of {floats}", "use unquantized weights")

    def _find(self, name: str) -> _Stored:
        if name not in self._stored:
            raise CheckpointError(f"{self.path}: {name}", "no such tensor", "a stored one", "use the whole checkpoint")
        return self._stored[name]

    def _take(self, name: str, index: slice | tuple[slice, slice] | None) -> torch.Tensor:
        stored = self._find(name)
        file, name = stored.file, stored.name
        self._announce(stored)
        if _is_pickle(file):
            tensors = _unpickle(file)
            if name not in tensors:
                raise _damaged(file, f"{name} is gone since it was opened")
            return tensors[name] if index is None else tensors[name][index]
        with _reported(file), safe_open(file, framework="pt") as opened:
            return opened.get_tensor(name) if index is None else opened.get_slice(name)[index]

    def _announce(self, stored: _Stored) -> None:
        if len(stored.shape) > 1:
            self.before_read(stored.file)

    def _check_range(self, name: str, axis: int, start: int, stop: int) -> None:
        shape = self._find(name).shape
        if axis >= len(shape) or not 0 <= start < stop <= shape[axis]:
            raise CheckpointError(
                f"{self.path}: {name}",
                f"{start}:{stop} of axis {axis}",
                f"a part of {list(shape)}",
                "correct the range",
            )


def row_chunks(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of consecutive rows, about CHUNK_VALUES values each; the same cuts for every tensor of the same shape."""
    return tensor.split(max(1, CHUNK_VALUES * len(tensor) // max(1, tensor.numel())))


@contextmanager
def _reported(file: Path) -> Iterator[None]:
    """Turns what safetensors and the file system raise on a file into CheckpointError."""
    try:
        yield
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: too large to map
        raise _damaged(file, str(error)) from error


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(str(file), f"an unreadable file ({what})", "complete weights", "download or save it again")


def _is_pickle(file: Path) -> bool:
    return file.suffix in _PICKLE_SUFFIXES


def _weights_file(path: Path) -> Path:
    """The weights file or index to read: ``path`` itself, or the first known one in the directory."""
    if found_instead(path) == "a directory":
        path /= _file_name(path)
    kind = found_instead(path)
    if kind is not None:
        raise CheckpointError(str(path), kind, "a file with weights", "check the path")
    if path.suffix != ".safetensors" and not path.name.endswith(".index.json") and not _is_pickle(path):
        suffixes = ", ".join((".safetensors", ".index.json", *_PICKLE_SUFFIXES))
        raise CheckpointError(str(path), f"a {path.suffix or 'nameless'} file", suffixes, "check the path")
    return path


def _file_name(directory: Path) -> str:
    with _reported(directory):
        entries = sorted(entry.name for entry in directory.iterdir())
    name = next((name for name in LAYOUTS if name in entries), None)
    if name is None:
        found = ", ".join(entries[:8]) or "an empty directory"
        raise CheckpointError(str(directory), found, f"one of {', '.join(LAYOUTS)}", "check the path")
    return name


def _contents(file: Path) -> dict[str, _Stored]:
    """Names, shapes and dtypes of one file's tensors, without their data."""
    if _is_pickle(file):
        return {
            name: _Stored(file, name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in _unpickle(file).items()
        }
    stored = {}
    with _reported(file), safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  (a safe_open is no mapping)
            part = opened.get_slice(name)
            dtype = _DTYPES.get(part.get_dtype(), part.get_dtype())
            stored[name] = _Stored(file, name, tuple(part.get_shape()), dtype)
    places = _places(file)  # of a header that safetensors has found valid
    changed = file.stat().st_mtime_ns
    return {name: replace(entry, offset=places[name], changed=changed) for name, entry in stored.items()}


def _places(file: Path) -> dict[str, int]:
    """Where every tensor's bytes begin in a safetensors file: after eight bytes of length and the header."""
    with _reported(file), file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return {name: 8 + length + int(entry["data_offsets"][0]) for name, entry in header.items()}


def _copy_rows(stored: _Stored, start: int, stop: int) -> torch.Tensor:
    """Rows of a safetensors file, read at their place.  # [stop - start, ...]"""
    rows = torch.empty((stop - start, *stored.shape[1:]), dtype=getattr(torch, stored.dtype))
    left = rows.reshape(-1).view(torch.uint8).numpy().data
    place = int(stored.offset or 0) + start * (len(left) // (stop - start))
    with _reported(stored.file), stored.file.open("rb", buffering=0) as opened:
        if stored.changed not in (None, os.fstat(opened.fileno()).st_mtime_ns):
            raise _damaged(stored.file, "it has changed since it was opened")
        while left:
            count = os.preadv(opened.fileno(), [left], place)
            if not count:
                raise _damaged(stored.file, "it is shorter than when it was opened")
            left, place = left[count:], place + count
    return rows


def _unpickle(file: Path) -> dict[str, torch.Tensor]:
    """A pickled state dict, mapped, through torch's allow-listed unpickler, which runs nothing that the file names."""
    try:
        body = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # hostile or damaged bytes can make the unpickler raise almost anything
        got = f"a pickle that cannot be read safely ({_pickle_reason(str(error)) or type(error).__name__})"
        raise CheckpointError(str(file), got, "plain tensors", "convert it to safetensors") from error
    if not isinstance(body, Mapping):
        raise CheckpointError(
            str(file), f"a pickled {type(body).__name__}", "a dictionary of tensors", "save the state_dict() alone"
        )
    for name, tensor in body.items():
        flaw = _flaw(tensor) if isinstance(name, str) else "a name that is no text"
        if flaw is not None:
            raise CheckpointError(f"{file}: {name}", flaw, "a dense tensor", "save the state_dict() alone")
    return dict(body)


def _pickle_reason(message: str) -> str:
    """Why torch refuses a pickle, without its advice: to trust the file, in several lines."""
    if named := _FORBIDDEN.search(message):
        return f"it asks for {named[1]}"
    if "mmap can only be used" in message:
        return "it is not the zip file that torch.save writes since 1.6"
    return message.split("WeightsUnpickler error: ")[-1].strip().split("\n")[0].split(". ")[0]


def _flaw(tensor: object) -> str | None:
    """What makes an unpickled object useless as weights; a tensor without bytes of its own could claim any size."""
    if not isinstance(tensor, torch.Tensor):
        return f"a {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.is_nested:
        return "a sparse or nested tensor"
    if tensor.device.type != "cpu" or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "a tensor whose values are not all stored"
    return None


def _read_index(file: Path) -> dict[str, str]:
    """``weight_map`` of an index: tensor name to shard file name."""
    try:
        body = read_json(file, *HUGGING_FACE)
    except ConfigError as error:
        raise CheckpointError(error.where, error.got, error.expected, error.action) from error
    shards = body.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(str(file), "no weight_map", "tensor names and their shards", "download the file again")
    for name, shard in shards.items():
        # A shard is a plain file name: anything else could reach outside of the checkpoint.
        if not isinstance(shard, str) or PureWindowsPath(shard).name != shard or shard in ("", "..") or "\0" in shard:
            raise CheckpointError(
                f"{file}: {name}", f"shard {shard!r}", "a file name in the same directory", "do not use this checkpoint"
            )
    return shards


def _collect(index: Path, shards: Mapping[str, str]) -> dict[str, _Stored]:
    """The tensors of all shards. A copy that the index does not mean, or a tensor that it does not list, is no error.

    transformers reads the shards in the order of their names, all of them, and keeps the last copy; the index has to agree with that.
    """
    again = "download the checkpoint again"
    stored: dict[str, _Stored] = {}
    for shard in sorted({*shards.values()}):
        file = index.parent / shard
        kind = found_instead(file)
        if kind is not None:
            raise CheckpointError(f"{index}: shard {shard}", kind, "a file beside the index", again)
        if file.suffix != ".safetensors" and not _is_pickle(file):
            raise CheckpointError(str(index), f"shard {shard}", "a .safetensors or .bin file", again)
        for name, entry in _contents(file).items():
            if name in stored and shards.get(name) != shard:
                got, meant = f"it again, after {stored[name].file.name}", shards.get(name, "none of them")
                expected = f"it once, or the last copy in {meant}, as the index says"
                raise CheckpointError(f"{file}: {name}", got, expected, "remove the copy that is not meant")
            stored[name] = entry
    for name, shard in shards.items():
        place = stored[name].file.name if name in stored else "no shard"
        if place != shard:
            raise CheckpointError(f"{index}: {name}", f"it in {place}", f"{shard}, as the index says", again)
    return stored
