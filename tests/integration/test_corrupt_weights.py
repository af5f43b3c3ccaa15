"""medusa-export on damaged and hostile weights files: one line that names the fault, nothing written, nothing run.

A file is damaged through a function of the inputs, which may give other flags for the command.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Change = Callable[[Any], dict[str, object] | None]
Header = dict[str, Any]

NORM = "model.norm.weight"  # [64], float16
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def split(file: Path) -> tuple[Header, bytes]:
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: bytes, data: bytes = b"", size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def content(new: bytes) -> Change:
    """Other bytes in place of the weights file."""

    def change(inputs: Any) -> None:
        inputs.weights.write_bytes(new)

    return change


def edited(edit: Callable[[bytes], bytes]) -> Change:
    """The weights file's bytes, changed."""

    def change(inputs: Any) -> None:
        inputs.weights.write_bytes(edit(inputs.weights.read_bytes()))

    return change


def header(edit: Callable[[Header], None]) -> Change:
    """The same tensors after a changed header."""

    def change(inputs: Any) -> None:
        body, data = split(inputs.weights)
        edit(body)
        inputs.weights.write_bytes(join(json.dumps(body).encode(), data))

    return change


def entry(**values: Any) -> Change:
    """One tensor's entry with other values; ``...`` removes one."""

    def edit(body: Header) -> None:
        body[NORM] = {name: value for name, value in {**body[NORM], **values}.items() if value is not ...}

    return header(edit)


def moved(start: int, stop: int) -> Change:
    """One tensor's offsets, moved by so many bytes."""

    def edit(body: Header) -> None:
        offsets = body[NORM]["data_offsets"]
        body[NORM]["data_offsets"] = [offsets[0] + start, offsets[1] + stop]

    return header(edit)


def reverse(body: Header) -> None:
    body[NORM]["data_offsets"].reverse()


def swap_shards(body: Header) -> None:
    """Two tensors of different sizes in each other's place."""
    embedding = "model.embed_tokens.weight"
    body[NORM]["data_offsets"], body[embedding]["data_offsets"] = (
        body[embedding]["data_offsets"],
        body[NORM]["data_offsets"],
    )


def twice(inputs: Any) -> None:
    """The last tensor's name given to the first one too."""
    body, data = split(inputs.weights)
    names = [name for name in body if name != "__metadata__"]
    parts = [f"{json.dumps(NORM if name == names[0] else name)}: {json.dumps(body[name])}" for name in names]
    inputs.weights.write_bytes(join(("{" + ", ".join(parts) + "}").encode(), data))


def hole(inputs: Any) -> None:
    """Eight bytes that belong to no tensor, in the middle of the data."""
    body, data = split(inputs.weights)
    start = body[NORM]["data_offsets"][0]
    for name, tensor in body.items():
        if name != "__metadata__" and tensor["data_offsets"][0] >= start:
            tensor["data_offsets"] = [offset + 8 for offset in tensor["data_offsets"]]
    inputs.weights.write_bytes(join(json.dumps(body).encode(), data[:start] + bytes(8) + data[start:]))


HEADERS: dict[str, tuple[Change, str]] = {
    "empty file": (content(b""), "header too small"),
    "shorter than its length field": (content(b"\x10\0\0"), "header too small"),
    "length alone": (content(struct.pack("<Q", 16)), "invalid header length"),
    "cut in the header": (edited(lambda data: data[:60]), "invalid header length"),
    "cut in the weights": (edited(lambda data: data[:-100]), "incomplete metadata"),
    "cut by a byte": (edited(lambda data: data[:-1]), "incomplete metadata"),
    "trailing garbage": (edited(lambda data: data + b"garbage!"), "incomplete metadata"),
    "header of length 0": (content(join(b"", bytes(64))), "invalid JSON in header: EOF"),
    "header of 2**40 bytes": (content(join(b"{}", bytes(64), 2**40)), "header too large"),
    "header of -1 bytes": (content(join(b"{}", bytes(64), 2**64 - 1)), "header too large"),
    "header longer than the file": (
        edited(lambda data: struct.pack("<Q", len(data)) + data[8:]),
        "invalid header length",
    ),
    "header shorter than it is": (
        edited(lambda data: struct.pack("<Q", 100) + data[8:]),
        "invalid JSON in header: EOF",
    ),
    "header is no JSON": (content(join(b"not { json ]")), "invalid JSON in header: expected ident"),
    "header is not UTF-8": (content(join(b'{"\xff\xfe": {}}')), "invalid UTF-8 in header"),
    "header is a list": (content(join(b"[]")), "invalid JSON in header: invalid type: sequence"),
    "header is empty": (content(join(b"{}")), "model.safetensors: got no tensors"),
    "deep header": (content(join(b"[" * 100_000)), "invalid JSON in header"),
    "deep entry": (content(join(b'{"a": ' + b"[" * 100_000)), "invalid JSON in header: recursion limit"),
    "NaN in the header": (header(lambda body: body.update(x=float("nan"))), "invalid JSON in header: expected value"),
    "name twice": (twice, "invalid offset for tensor `model.embed_tokens.weight`"),
    "overlapping tensors": (moved(-8, -8), "invalid offset for tensor `model.norm.weight`"),
    "gap between tensors": (hole, "invalid offset for tensor `model.norm.weight`"),
    "outside the file": (moved(10**6, 10**6), "invalid offset for tensor `model.norm.weight`"),
    "exchanged offsets": (header(swap_shards), "invalid shape, data type, or offset"),
    "reversed offsets": (header(reverse), "invalid offset for tensor `model.norm.weight`"),
    "negative offset": (entry(data_offsets=[-128, 0]), "invalid JSON in header: invalid value: integer `-128`"),
    "fractional offset": (
        entry(data_offsets=[0.5, 128.5]),
        "invalid JSON in header: invalid type: floating point `0.5`",
    ),
    "three offsets": (entry(data_offsets=[0, 64, 128]), "invalid JSON in header: invalid length 3"),
    "offsets of 2**63": (entry(data_offsets=[2**63, 2**63 + 128]), "invalid offset for tensor `model.norm.weight`"),
    "size is not shape times dtype": (entry(shape=[65]), "invalid shape, data type, or offset"),
    "size of another dtype": (entry(dtype="F32"), "invalid shape, data type, or offset"),
    "unknown dtype": (entry(dtype="F17"), "invalid JSON in header: unknown variant `F17`"),
    "dtype is a number": (entry(dtype=16), "invalid JSON in header: invalid type: integer `16`"),
    "complex numbers": (entry(dtype="C64", shape=[16]), "model.norm.weight: got shape [16]; expected [64]"),
    "negative dimension": (entry(shape=[-64]), "invalid JSON in header: invalid value: integer `-64`"),
    "dimension of 2**62": (entry(shape=[2**62]), "overflow computing buffer size"),
    "product that wraps around to 64": (entry(shape=[2**32, 2**32, 64]), "overflow computing buffer size"),
    "zeros": (entry(shape=[0], data_offsets=[0, 0]), "incomplete metadata"),
    "another shape": (entry(shape=[8, 8]), "model.norm.weight: got shape [8, 8]; expected [64]"),
    "integers": (entry(dtype="I16"), "model.norm.weight: got dtype int16; expected one of float16"),
    "no shape": (entry(shape=...), "invalid JSON in header: missing field `shape`"),
    "no dtype": (entry(dtype=...), "invalid JSON in header: missing field `dtype`"),
    "no offsets": (entry(data_offsets=...), "invalid JSON in header: missing field `data_offsets`"),
    "entry is a string": (
        header(lambda body: body.update({NORM: "weights"})),
        "invalid JSON in header: invalid type: string",
    ),
    "metadata are not strings": (
        header(lambda body: body.update(__metadata__={"format": 1})),
        "invalid JSON in header: invalid type: integer `1`",
    ),
    "metadata are a list": (
        header(lambda body: body.update(__metadata__=[])),
        "invalid JSON in header: invalid type: sequence",
    ),
    "tensor missing": (header(lambda body: body.pop(NORM)), "incomplete metadata"),
}


def sharded(inputs: Any) -> dict[str, str]:
    """The weights in two shards with an index. Returns its ``weight_map``."""
    tensors = load_file(inputs.weights)
    inputs.weights.unlink()
    names = sorted(tensors)
    weight_map = {name: FIRST if name < "model.layers.1" else SECOND for name in names}
    for shard in (FIRST, SECOND):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, inputs.model / shard)
    write_index(inputs, weight_map)
    return weight_map


def write_index(inputs: Any, weight_map: object) -> None:
    (inputs.model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def index(text: bytes) -> Change:
    """Another text as index."""

    def change(inputs: Any) -> None:
        sharded(inputs)
        (inputs.model / INDEX).write_bytes(text)

    return change


def mapped(**places: str) -> Change:
    """An index with other shards for some tensors; double underscores stand for dots."""

    def change(inputs: Any) -> None:
        write_index(inputs, sharded(inputs) | {name.replace("__", "."): shard for name, shard in places.items()})

    return change


def outside(shard: str) -> Change:
    """The first shard lies outside of the directory, where the index says."""

    def change(inputs: Any) -> None:
        weight_map = sharded(inputs)
        (inputs.model / FIRST).rename(inputs.root / "stolen.safetensors")
        name = shard.format(inputs.root)
        write_index(inputs, {key: name if value == FIRST else value for key, value in weight_map.items()})

    return change


def second_shard(replace: Callable[[Path], None]) -> Change:
    """Something else in place of the second shard."""

    def change(inputs: Any) -> None:
        sharded(inputs)
        (inputs.model / SECOND).unlink()
        replace(inputs.model / SECOND)

    return change


def in_both(inputs: Any) -> None:
    sharded(inputs)
    save_file({**load_file(inputs.model / SECOND), "lm_head.weight": torch.ones(97, 64)}, inputs.model / SECOND)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def dangle(path: Path) -> None:
    path.symlink_to("../blobs/0123abcd")


SHARDS: dict[str, tuple[Change, str]] = {
    "index is no JSON": (index(b"{"), "got unreadable JSON (Expecting"),
    "index is not UTF-8": (index(b"\xff\xfe{}"), "got unreadable JSON (not UTF-8"),
    "index is a list": (index(b"[]"), "got a JSON list"),
    "index is deep": (index(b"[" * 100_000), "got unreadable JSON (nested too deeply"),
    "index is a huge number": (
        index(b'{"weight_map": ' + b"9" * 5000 + b"}"),
        "got unreadable JSON (Exceeds the limit",
    ),
    "no weight_map": (index(b"{}"), "got no weight_map"),
    "empty weight_map": (index(b'{"weight_map": {}}'), "got no weight_map"),
    "weight_map is a list": (index(b'{"weight_map": ["a"]}'), "got no weight_map"),
    "shard is a number": (index(b'{"weight_map": {"a": 1}}'), "a: got shard 1; expected a file name"),
    "shard is missing": (
        mapped(model__norm__weight="model-00003.safetensors"),
        "shard model-00003.safetensors: got no such file",
    ),
    "shard in the parent": (outside("../stolen.safetensors"), "lm_head.weight: got shard '../stolen.safetensors'"),
    "shard by its whole path": (
        outside("{}/stolen.safetensors"),
        "stolen.safetensors'; expected a file name in the same",
    ),
    "shard with a backslash": (outside("..\\stolen.safetensors"), "got shard '..\\\\stolen.safetensors'"),
    "shard in a folder": (outside("../model/../stolen.safetensors"), "got shard '../model/../stolen.safetensors'"),
    "shard is the parent": (mapped(model__norm__weight=".."), "got shard '..'; expected a file name"),
    "shard without a name": (mapped(model__norm__weight=""), "got shard ''; expected a file name"),
    "shard with a NUL": (mapped(model__norm__weight="a\0.safetensors"), "got shard 'a\\x00.safetensors'"),
    "shard with a very long name": (
        mapped(model__norm__weight="a" * 5000 + ".safetensors"),
        "got a path that cannot be read (File name too long)",
    ),
    "shard is a config": (mapped(model__norm__weight="config.json"), "got shard config.json; expected a .safetensors"),
    "tensor in the other shard": (mapped(model__norm__weight=FIRST), f"model.norm.weight: got it in {SECOND}"),
    "tensor in no shard": (mapped(model__extra__weight=FIRST), "model.extra.weight: got it in no shard"),
    "tensor in both shards": (in_both, "lm_head.weight: got it again"),
    "dangling link": (second_shard(dangle), f"shard {SECOND}: got a link to nothing"),
    "link to itself": (second_shard(loop), f"shard {SECOND}: got a path that cannot be read (Too many levels"),
    "directory for a shard": (second_shard(Path.mkdir), f"shard {SECOND}: got a directory"),
    "FIFO for a shard": (second_shard(os.mkfifo), f"shard {SECOND}: got a FIFO"),
    "empty shard": (second_shard(Path.touch), f"{SECOND}: got an unreadable file"),
}


def instead(replace: Callable[[Path], None]) -> Change:
    """Something else in place of the weights file."""

    def change(inputs: Any) -> None:
        inputs.weights.unlink()
        replace(inputs.weights)

    return change


def heads_instead(replace: Callable[[Path], None]) -> Change:
    """Something else in place of the heads' weights file, which is named on the command line."""

    def change(inputs: Any) -> dict[str, object]:
        inputs.head_weights.unlink()
        replace(inputs.head_weights)
        return {"heads": inputs.head_weights}

    return change


SPECIAL: dict[str, tuple[Change, str]] = {
    "directory for the weights": (instead(Path.mkdir), "model.safetensors: got a directory"),
    "FIFO for the weights": (instead(os.mkfifo), "model.safetensors: got a FIFO"),
    "dangling link for the weights": (instead(dangle), "model.safetensors: got a link to nothing"),
    "link to itself for the weights": (
        instead(loop),
        "model.safetensors: got a path that cannot be read (Too many levels",
    ),
    "no weights": (
        instead(lambda path: None),
        "expected one of model.safetensors, model.safetensors.index.json, pytorch_model.bin",
    ),
    "FIFO for the heads": (heads_instead(os.mkfifo), "medusa_lm_head.safetensors: got a FIFO"),
    "directory for the heads": (
        heads_instead(Path.mkdir),
        "medusa_lm_head.safetensors: got a directory without weights",
    ),
    "dangling link for the heads": (heads_instead(dangle), "medusa_lm_head.safetensors: got a link to nothing"),
    "device for the heads": (lambda inputs: {"heads": "/dev/zero"}, "/dev/zero: got a device"),
    "very long name for the heads": (
        lambda inputs: {"heads": "h" * 5000},
        "got a path that cannot be read (File name too long)",
    ),
    "very long name for the checkpoint": (
        lambda inputs: {"ckpt": "c" * 5000},
        "/config.json: got a path that cannot be read (File name too long)",
    ),
    "a config for the heads": (
        lambda inputs: {"heads": inputs.heads / "config.json"},
        "config.json: got a .json file; expected .safetensors",
    ),
}


class Touch:
    """Unpickled, it makes a directory: what a hostile checkpoint would do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class Subclass(torch.Tensor):
    """A tensor whose class the reader does not know."""


def pickled(make: Callable[[Any, dict[str, torch.Tensor]], object]) -> Change:
    """pytorch_model.bin in place of the safetensors file, with what ``make`` makes of the inputs and the weights."""

    def change(inputs: Any) -> None:
        tensors = load_file(inputs.weights)
        inputs.weights.unlink()
        body = make(inputs, tensors)
        file = inputs.model / "pytorch_model.bin"
        if isinstance(body, bytes):
            file.write_bytes(body)
        else:
            torch.save(body, file)

    return change


def saved(body: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(body, buffer)
    return buffer.getvalue()


def with_norm(value: object) -> Change:
    """All weights, but one of them is something else."""
    return pickled(lambda inputs, tensors: {**tensors, NORM: value})


def without_data(inputs: Any, tensors: dict[str, torch.Tensor]) -> bytes:
    """A zip with every tensor's description but not one byte of them."""
    source, target = zipfile.ZipFile(io.BytesIO(saved(tensors))), io.BytesIO()
    with zipfile.ZipFile(target, "w") as short:
        for name in source.namelist():
            if "/data/" not in name:
                short.writestr(name, source.read(name))
    return target.getvalue()


def many_values(inputs: Any, tensors: dict[str, torch.Tensor]) -> bytes:
    """A tensor whose description claims 2**40 values of storage."""
    source, target = zipfile.ZipFile(io.BytesIO(saved({NORM: torch.ones(4096)}))), io.BytesIO()
    with zipfile.ZipFile(target, "w") as long:
        for name in source.namelist():
            body = source.read(name)
            if name.endswith("data.pkl"):
                number = b"M" + struct.pack("<H", 4096)
                assert body.count(number) == 2  # the storage's size and the tensor's
                body = body.replace(number, b"\x8a\x06" + (2**40).to_bytes(6, "little"))
            long.writestr(name, body)
    return target.getvalue()


PICKLES: dict[str, tuple[Change, str]] = {
    "runs code when it is read": (
        pickled(lambda inputs, _: pickle.dumps(Touch(inputs.root / "owned"))),
        "(it is not the zip file",
    ),
    "runs code from a zip": (
        pickled(lambda inputs, x: {**x, "a": Touch(inputs.root / "owned")}),
        "(it asks for posix.mkdir)",
    ),
    "runs code in a collection": (
        pickled(lambda inputs, x: Counter({"a": Touch(inputs.root / "owned")})),
        "(it asks for posix.mkdir)",
    ),
    "eval by name": (
        pickled(lambda inputs, _: f'cbuiltins\neval\n(S\'open("{inputs.root}/owned", "w")\'\ntR.'.encode()),
        "(it is not the zip file",
    ),
    "cut in half": (pickled(lambda inputs, x: saved(x)[: len(saved(x)) // 2]), "failed reading zip archive"),
    "cut by a byte": (pickled(lambda inputs, x: saved(x)[:-1]), "failed reading zip archive"),
    "empty": (pickled(lambda inputs, x: b""), "(it is not the zip file"),
    "neither zip nor pickle": (pickled(lambda inputs, x: b"GGUF" + bytes(400)), "(it is not the zip file"),
    "a safetensors file by the wrong name": (pickled(lambda inputs, x: join(b"{}")), "(it is not the zip file"),
    "a zip of something else": (pickled(without_data), "failed locating file data/0"),
    "a storage of 2**40 values": (pickled(many_values), "bin: got a pickle that cannot be read safely ("),
    "a list": (pickled(lambda inputs, x: list(x.values())), "bin: got a pickled list"),
    "a whole training state": (pickled(lambda inputs, x: {"model": x, "step": 5}), "bin: model: got a dict"),
    "a number among tensors": (with_norm(0.5), "bin: model.norm.weight: got a float; expected a dense tensor"),
    "None among tensors": (with_norm(None), "bin: model.norm.weight: got a NoneType; expected a dense tensor"),
    "sparse tensor": (with_norm(torch.ones(64).to_sparse()), "bin: model.norm.weight: got a sparse"),
    "quantized tensor": (
        pickled(lambda inputs, x: {**x, NORM: torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.qint8)}),
        "bin: model.norm.weight: got dtype qint8",
    ),
    "tensor without data": (
        with_norm(torch.ones(64, device="meta")),
        "bin: model.norm.weight: got a tensor whose values are not all stored",
    ),
    "one value that claims to be 2**40": (
        with_norm(torch.ones(1, dtype=torch.float16).expand(2**40)),
        "bin: model.norm.weight: got a tensor whose values are not all stored",
    ),
    "one value that claims to be 64": (
        with_norm(torch.ones(1, dtype=torch.float16).expand(64)),
        "bin: model.norm.weight: got a tensor whose values are not all stored",
    ),
    "tensor of another class": (with_norm(torch.ones(64).as_subclass(Subclass)), "Subclass)"),
    "names that are numbers": (pickled(lambda inputs, x: {1: torch.ones(1)}), "bin: 1: got a name that is no text"),
    "complex numbers": (with_norm(torch.ones(64, dtype=torch.complex64)), "dtype complex64"),
    "a hostile pickle as heads": (
        lambda inputs: (
            torch.save({"0.0.linear.weight": Touch(inputs.root / "owned")}, inputs.root / "heads.pt")
            or {"heads": inputs.root / "heads.pt"}
        ),
        "heads.pt: got a pickle that cannot be read safely (it asks for posix.mkdir)",
    ),
}


ALL = {"header": HEADERS, "shards": SHARDS, "special": SPECIAL, "pickle": PICKLES}


@pytest.mark.filterwarnings("ignore:TypedStorage", "ignore:torch.quantize_per_tensor")
@pytest.mark.timeout(60, method="thread")  # a FIFO that is opened waits forever, out of the reach of signals
@pytest.mark.parametrize(
    ("change", "message"),
    [pytest.param(*case, id=f"{kind}: {name}") for kind, table in ALL.items() for name, case in table.items()],
)
def test_refused(change: Change, message: str, inputs: Any, refused: Any) -> None:
    assert message in refused(**(change(inputs) or {}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        HEADERS["header of 2**40 bytes"],
        HEADERS["product that wraps around to 64"],
        SPECIAL["FIFO for the weights"],
        PICKLES["a storage of 2**40 values"],
        PICKLES["one value that claims to be 2**40"],
        PICKLES["runs code from a zip"],
    ],
)
def test_refused_in_little_memory(change: Change, message: str, inputs: Any, refused: Any) -> None:
    """And in a process of its own: without the modules and handlers of the tests."""
    change(inputs)
    assert message in refused.alone()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model/model.safetensors", "model.safetensors: got an unreadable file"),
        ("model/config.json", "config.json: got unreadable JSON"),
        ("model/tokenizer.json", "model: got an unreadable tokenizer"),
    ],
)
def test_no_right_to_read(name: str, message: str, inputs: Any, refused: Any) -> None:
    path = inputs.root / name
    path.chmod(0)
    try:
        assert message in refused()
    finally:
        path.chmod(0o700)


def test_nan_in_the_base_model(inputs: Any, refused: Any) -> None:
    """Found where its weights are read the first time, which is while the output is written."""
    tensors = load_file(inputs.weights)
    tensors[NORM][5] = float("nan")
    save_file(tensors, inputs.weights)
    assert "expected finite weights" in refused()


def test_the_bomb_is_one(tmp_path: Path) -> None:
    """Or no test here could fail."""
    torch.save(Touch(tmp_path / "owned"), tmp_path / "bomb.pt")
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert (tmp_path / "owned").is_dir()


def test_what_is_odd_but_good(inputs: Any, export: Callable[..., Any]) -> None:
    """A checkpoint of links, as in the cache of the Hugging Face hub, whose headers have keys that nobody reads."""
    header(lambda body: body[NORM].update(extra=1))(inputs)
    inputs.model.rename(inputs.root / "blobs")
    inputs.model.mkdir()
    for file in (inputs.root / "blobs").iterdir():
        (inputs.model / file.name).symlink_to(Path("..") / "blobs" / file.name)
    assert export(inputs.flags()) == (0, f"wrote {inputs.root / 'work/out'}\n", "end-of-sequence token: </s> (id 2)\n")
