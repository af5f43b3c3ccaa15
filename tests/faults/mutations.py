"""Faults by kind over every file of an export. A fault changes one thing; the manifest's hashes are mended behind it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from medusa_export.core.artifacts.hashing import sha256
from medusa_export.core.artifacts.manifest import MANIFEST

Tensor = torch.Tensor


@dataclass(frozen=True)
class Fault:
    """One change to a directory.

    Attributes:
        kind: of change: "drop", "swap" ...
        file: relative name.
        target: the tensor, key or operator that is changed.
    """

    kind: str
    file: str
    target: str
    apply: Callable[[Path], None]

    @property
    def name(self) -> str:
        return f"{self.kind} {self.target} in {self.file}" if self.target else f"{self.kind} {self.file}"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


def _times(tensor: Tensor, factor: float) -> Tensor:
    if not tensor.is_floating_point():
        return tensor ^ 1 if tensor.dtype == torch.uint8 else -tensor
    return (tensor.to(torch.float32) * factor).to(tensor.dtype)


def _swapped_bytes(tensor: Tensor) -> Tensor:
    size = tensor.element_size()
    if size == 1:
        codes = _bytes(tensor)
        return ((codes << 4) | (codes >> 4)).view(tensor.dtype)
    return _bytes(tensor).reshape(-1, size).flip(1).contiguous().view(tensor.dtype).reshape(tensor.shape)


def _rolled(tensor: Tensor) -> Tensor:
    return _by_bytes(tensor, lambda x: x.roll(1, 0))


def _reordered(tensor: Tensor) -> Tensor:
    return _by_bytes(tensor, lambda x: x.flip(0))


def _transposed(tensor: Tensor) -> Tensor:
    if tensor.dim() != 2:
        return tensor
    return _by_bytes(tensor, lambda x: x.transpose(0, 1).contiguous().reshape(x.shape))


def _by_bytes(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """float8 has few operators of its own."""
    if not tensor.dim():
        return tensor
    if tensor.dtype != torch.float8_e4m3fn:
        return change(tensor).contiguous()
    return change(tensor.view(torch.uint8)).contiguous().view(tensor.dtype)


VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "scale": lambda tensor: _times(tensor, 1.25),
    "negate": lambda tensor: _times(tensor, -1.0),
    "shift": _rolled,
    "reorder": _reordered,
    "transpose": _transposed,
    "byte order": _swapped_bytes,
    "zero": torch.zeros_like,
}
OTHER_DTYPE = {torch.float16: torch.bfloat16, torch.bfloat16: torch.float16, torch.float32: torch.float16,
               torch.float8_e4m3fn: torch.int8, torch.int8: torch.uint8, torch.float64: torch.float32}  # fmt: skip


def faults(out: Path, other: Path | None = None) -> Iterator[Fault]:
    """Every fault of every file.

    Args:
        other: another export of the same shapes, whose files take the place of this one's.
    """
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        file = path.relative_to(out).as_posix()
        if path.suffix == ".safetensors":
            yield from _tensor_faults(file, path)
        elif path.suffix == ".onnx":
            yield from _graph_faults(file, path)
        elif path.suffix == ".json":
            yield from _json_faults(file, path)
        elif path.suffix == ".pbtxt":
            yield from _text_faults(file, path)
        elif path.suffix == ".jinja":
            yield Fault("cut", file, "", lambda root, file=file: _cut(root / file))
        if other is not None and file != MANIFEST and (other / file).read_bytes() != path.read_bytes():
            yield Fault(
                "another export's", file, "", lambda root, file=file: _replace(root / file, (other / file).read_bytes())
            )
    yield from _rank_faults(out)


def _rank_faults(out: Path) -> Iterator[Fault]:
    """Ranks in each other's place."""
    ranks = sorted((out / "trtllm").glob("rank*.safetensors"))
    if len(ranks) > 1:
        names = [path.relative_to(out).as_posix() for path in ranks[:2]]

        def swap(root: Path) -> None:
            contents = [(root / name).read_bytes() for name in names]
            for name, content in zip(names, contents[::-1], strict=True):
                _replace(root / name, content)

        yield Fault("swap", "trtllm", "rank0 and rank1", swap)


def _tensor_faults(file: str, path: Path) -> Iterator[Fault]:
    tensors = load_file(path)
    for name, tensor in tensors.items():
        yield Fault("drop", file, name, _edit(file, lambda all_, name=name: all_.pop(name)))
        if tensor.dtype in OTHER_DTYPE:
            yield Fault(
                "dtype",
                file,
                name,
                _edit(file, lambda all_, name=name: all_.update({name: all_[name].to(OTHER_DTYPE[all_[name].dtype])})),
            )
        for kind, change in VALUES.items():
            changed = change(tensor)
            if not torch.equal(_bytes(changed), _bytes(tensor)):
                yield Fault(
                    kind,
                    file,
                    name,
                    _edit(file, lambda all_, name=name, change=change: all_.update({name: change(all_[name])})),
                )
        twin = next((each for each in tensors if each > name and _like(tensors[each], tensor)), None)
        if twin is not None:
            yield Fault(
                "swap",
                file,
                f"{name} and {twin}",
                _edit(
                    file, lambda all_, one=name, two=twin: all_.update({one: all_[two].clone(), two: all_[one].clone()})
                ),
            )


def _like(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and not torch.equal(_bytes(one), _bytes(other))


def _edit(file: str, change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        with safe_open(root / file, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = {name: tensor.clone() for name, tensor in load_file(root / file).items()}
        change(tensors)
        (root / file).unlink()  # others may be linked to it
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, root / file, metadata)

    return apply


def _graph_faults(file: str, path: Path) -> Iterator[Fault]:
    """Values of constants, in place; operators' attributes and inputs; outputs of operators that change places."""
    model = onnx.load(path)
    for index, proto in enumerate(model.graph.initializer):
        kinds = _DTYPES.get(proto.data_type)
        if kinds is None:
            continue
        tensor = torch.frombuffer(bytearray(proto.raw_data), dtype=kinds)
        tensor = tensor.reshape(tuple(proto.dims)) if tensor.numel() == torch.Size(proto.dims).numel() else tensor
        for kind, change in VALUES.items():
            changed = change(tensor)
            if changed.shape == tensor.shape and not torch.equal(_bytes(changed), _bytes(tensor)):
                yield Fault(
                    kind,
                    file,
                    proto.name,
                    lambda root, index=index, change=change: _constant(root / file, index, change),
                )
        twin = next((i for i, each in enumerate(model.graph.initializer) if i > index and each.data_type == proto.data_type
                     and each.dims == proto.dims and each.raw_data != proto.raw_data), None)  # fmt: skip
        if twin is not None:
            yield Fault(
                "swap",
                file,
                f"{proto.name} and {model.graph.initializer[twin].name}",
                lambda root, pair=(index, twin): _swap_constants(root / file, *pair),
            )
    for number, node in enumerate(model.graph.node):
        for place, attribute in enumerate(node.attribute):
            yield Fault(
                "alter",
                file,
                f"{node.op_type} {node.name}: {attribute.name}",
                lambda root, at=(number, place): _attribute(root / file, *at),
            )
        if len(node.input) > 1 and node.input[0] != node.input[1]:
            yield Fault(
                "swap",
                file,
                f"{node.op_type} {node.name}: inputs",
                lambda root, number=number: _swap_inputs(root / file, number),
            )
        twin = next(
            (
                i
                for i, each in enumerate(model.graph.node)
                if i > number and each.op_type == node.op_type and len(each.input) == len(node.input)
            ),
            None,
        )
        if twin is not None and len(node.input) > 1 and model.graph.node[twin].input[1] != node.input[1]:
            yield Fault(
                "rewire",
                file,
                f"{node.op_type} {node.name}",
                lambda root, pair=(number, twin): _rewire(root / file, *pair),
            )


_DTYPES = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16, 17: torch.float8_e4m3fn, 3: torch.int8, 2: torch.uint8,
           6: torch.int32, 7: torch.int64, 21: torch.uint8, 22: torch.uint8}  # fmt: skip


def _constant(path: Path, index: int, change: Callable[[Tensor], Tensor]) -> None:
    """Change a constant where it is stored: in the model, or in the data file beside it."""
    model = onnx.load(path, load_external_data=False)
    proto = model.graph.initializer[index]
    place = {entry.key: entry.value for entry in proto.external_data}
    data = path.with_name(place["location"]).read_bytes() if place else b""
    start, length = int(place.get("offset", 0)), int(place.get("length", 0))
    raw = data[start : start + length] if place else proto.raw_data
    tensor = torch.frombuffer(bytearray(raw), dtype=_DTYPES[proto.data_type])
    tensor = tensor.reshape(tuple(proto.dims)) if tensor.numel() == torch.Size(proto.dims).numel() else tensor
    changed = bytes(_bytes(change(tensor)).numpy().tobytes())
    if place:
        _replace(path.with_name(place["location"]), data[:start] + changed + data[start + length :])
    else:
        proto.raw_data = changed
        _save(path, model)


def _swap_constants(path: Path, one: int, other: int) -> None:
    """Two names for each other's values."""
    model = onnx.load(path, load_external_data=False)
    first, second = model.graph.initializer[one], model.graph.initializer[other]
    first.name, second.name = second.name, first.name
    _save(path, model)


def _attribute(path: Path, number: int, place: int) -> None:
    model = onnx.load(path, load_external_data=False)
    attribute = model.graph.node[number].attribute[place]
    if attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = attribute.f * 2 or 1.0
    elif attribute.type == onnx.AttributeProto.INT:
        attribute.i = attribute.i + 1
    elif attribute.type == onnx.AttributeProto.INTS:
        attribute.ints[:] = list(attribute.ints)[::-1]
    else:
        attribute.s = b"other"
    _save(path, model)


def _swap_inputs(path: Path, number: int) -> None:
    model = onnx.load(path, load_external_data=False)
    names = model.graph.node[number].input
    names[0], names[1] = names[1], names[0]
    _save(path, model)


def _rewire(path: Path, one: int, other: int) -> None:
    """Two operators read each other's second input."""
    model = onnx.load(path, load_external_data=False)
    first, second = model.graph.node[one].input, model.graph.node[other].input
    first[1], second[1] = second[1], first[1]
    _save(path, model)


def _json_faults(file: str, path: Path) -> Iterator[Fault]:
    body = json.loads(path.read_text(encoding="utf-8"))
    for keys in _leaves(body, limit=400):
        yield Fault("alter", file, ".".join(map(str, keys)), lambda root, keys=keys: _alter(root / file, keys))


def _text_faults(file: str, path: Path) -> Iterator[Fault]:
    """Each value of a Triton configuration: numbers, words and names."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        key, mark, value = line.partition(": ")
        if mark:
            target, other = f"{key.strip()} in line {number + 1}", f"{key}: {_other_text(value)}"
            yield Fault("alter", file, target, lambda root, at=number, to=other: _line(root / file, at, to))
            yield Fault("drop", file, target, lambda root, at=number: _line(root / file, at, ""))


def _other_text(value: str) -> str:
    if value.lstrip("-").isdigit():
        return str(int(value) + 1)
    return (
        f'{value[:-1]}x"'
        if value.endswith('"')
        else f"{value}_X"
        if value.isupper()
        else "true"
        if value == "false"
        else "false"
    )


def _line(path: Path, number: int, text: str) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[number] = text
    _replace(path, "\n".join([*lines, ""]).encode())


def _leaves(body: Any, limit: int) -> list[tuple[Any, ...]]:
    """Paths to values; of long lists and tables every so many."""
    found: list[tuple[Any, ...]] = []

    def walk(value: Any, keys: tuple[Any, ...]) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                if keys == () and key in ("files", "created", "command", "versions", "inputs", "tool_version"):
                    continue  # of the manifest: a record of what was, not of what is
                walk(each, (*keys, key))
        elif isinstance(value, list) and value:
            for index, each in enumerate(value):
                walk(each, (*keys, index))
        else:
            found.append(keys)

    walk(body, ())
    return found[:: max(1, len(found) // limit)]


def _alter(path: Path, keys: tuple[Any, ...]) -> None:
    body = json.loads(path.read_text(encoding="utf-8"))
    inside = body
    for key in keys[:-1]:
        inside = inside[key]
    inside[keys[-1]] = _other(inside[keys[-1]])
    _replace(path, (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode())


def _other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 2 or 1.0
    if isinstance(value, str):
        return "float16" if value == "bfloat16" else "bfloat16" if value == "float16" else f"{value}x"
    return 1 if value is None else [value]


def _cut(path: Path) -> None:
    _replace(path, path.read_bytes()[: path.stat().st_size // 2])


def _save(path: Path, model: Any) -> None:
    _replace(path, copy.deepcopy(model).SerializeToString())


def _replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def mend(out: Path) -> None:
    """Hashes and sizes in the manifest as the files are now: only understanding finds the fault."""
    path = out / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    files = {each.relative_to(out).as_posix(): each for each in sorted(out.rglob("*")) if each.is_file()}
    files.pop(MANIFEST)
    manifest["files"] = {name: {"size": each.stat().st_size, "sha256": sha256(each)} for name, each in files.items()}
    path.unlink()
    path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def drawn(every: list[Fault], count: int, seed: int) -> list[Fault]:
    """So many faults: first one of each kind and file, in turn, so that small files count as much as large ones."""
    chance = random.Random(seed)
    groups: dict[tuple[str, str], list[Fault]] = {}
    for fault in every:
        groups.setdefault((fault.file, fault.kind), []).append(fault)
    for group in groups.values():
        chance.shuffle(group)
    chosen: list[Fault] = []
    order = list(groups.values())
    while order and len(chosen) < count:
        chance.shuffle(order)
        chosen += [group.pop() for group in order]
        order = [group for group in order if group]
    return chosen[:count]
