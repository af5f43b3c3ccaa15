"""TensorSource: every layout reads the same values; every kind of damage is one CheckpointError."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from medusa_export.core.errors import CheckpointError
from medusa_export.heads.checkpoint.tensor_source import TensorSource


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "a.weight": torch.randn(6, 4, generator=generator),
        "b.weight": torch.randn(5, 3, generator=generator).to(torch.bfloat16),
        "c.bias": torch.randn(7, generator=generator).to(torch.float16),
        "d.ids": torch.arange(4, dtype=torch.int8),
        "e.scale": torch.tensor(0.5),
    }


def _write(directory: Path, layout: str) -> Path:
    """One of the layouts of ``save_pretrained``, holding ``_tensors()``; gives the path to open."""
    tensors = _tensors()
    first, second = dict(list(tensors.items())[:2]), dict(list(tensors.items())[2:])
    directory.mkdir(exist_ok=True)
    if layout == "safetensors":
        save_file(tensors, directory / "model.safetensors")
    elif layout == "bin":
        torch.save(tensors, directory / "pytorch_model.bin")
    elif layout == "pt file":
        torch.save(tensors, directory / "heads.pt")
        return directory / "heads.pt"
    else:
        suffix, stem = ("safetensors", "model") if layout == "sharded safetensors" else ("bin", "pytorch_model")
        weight_map: dict[str, str] = {}
        for number, part in enumerate((first, second), start=1):
            name = f"{stem}-{number:05}-of-00002.{suffix}"
            (save_file if suffix == "safetensors" else torch.save)(part, directory / name)
            weight_map |= dict.fromkeys(part, name)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize("layout", ["safetensors", "sharded safetensors", "bin", "sharded bin", "pt file"])
def test_every_layout_reads_the_same(tmp_path: Path, layout: str) -> None:
    source = TensorSource.open(_write(tmp_path / "ckpt", layout))
    expected = _tensors()
    assert sorted(source.names) == sorted(expected)
    assert {path.name for path in source.files} == set(os.listdir(tmp_path / "ckpt"))
    for name, tensor in expected.items():
        assert name in source
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == str(tensor.dtype).removeprefix("torch.")
        assert source.read(name).dtype == tensor.dtype
        assert torch.equal(source.read(name), tensor)
    assert "z" not in source
    assert torch.equal(source.read_rows("a.weight", 1, 4), expected["a.weight"][1:4])
    assert torch.equal(source.read_rows("c.bias", 5, 7), expected["c.bias"][5:7])
    assert torch.equal(source.read_columns("b.weight", 1, 3), expected["b.weight"][:, 1:3])


@pytest.mark.parametrize(
    ("name", "axis", "start", "stop"),
    [("a.weight", 0, 2, 7), ("a.weight", 0, -1, 2), ("a.weight", 1, 3, 3), ("c.bias", 1, 0, 1), ("e.scale", 0, 0, 1)],
)
def test_a_range_outside_the_tensor_is_refused(tmp_path: Path, name: str, axis: int, start: int, stop: int) -> None:
    source = TensorSource.open(_write(tmp_path / "ckpt", "safetensors"))
    with pytest.raises(CheckpointError, match=f"{name}: got {start}:{stop} of axis {axis}"):
        (source.read_columns if axis else source.read_rows)(name, start, stop)


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_writing_into_a_read_tensor_leaves_the_file(tmp_path: Path, layout: str) -> None:
    source = TensorSource.open(_write(tmp_path / "ckpt", layout))
    source.read("a.weight").zero_()
    assert torch.equal(source.read("a.weight"), _tensors()["a.weight"])


def _resident_file_pages_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssFile")).split()[1]) / 1024


def _mapped_mib(file: Path) -> float:
    """How much of a file is mapped into this process."""
    spans = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(file) in line
    ]
    return sum(int(stop, 16) - int(start, 16) for start, stop in spans) / 2**20


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_only_the_kept_tensor_is_resident(tmp_path: Path, suffix: str) -> None:
    tensors = {f"t{i}": torch.full((1024, 1024), float(i)) for i in range(6)}  # 4 MiB each
    file = tmp_path / f"x.{suffix}"
    save_file(tensors, file) if suffix == "safetensors" else torch.save(tensors, file)
    del tensors
    source = TensorSource.open(file)
    assert _mapped_mib(file) == 0
    for number in range(6):
        before = _resident_file_pages_mib()
        tensor = source.read(f"t{number}")
        assert float(tensor[5, 5]) == number
        assert _mapped_mib(file) > 0
        assert float(tensor.sum()) == number * 2**20
        assert _resident_file_pages_mib() - before < 7
        del tensor
        assert _mapped_mib(file) == 0


def test_safetensors_win_over_pickles(tmp_path: Path) -> None:
    _write(tmp_path, "bin")
    _write(tmp_path, "safetensors")
    assert [path.name for path in TensorSource.open(tmp_path).files] == ["model.safetensors"]


def test_require_accepts_what_is_there(tmp_path: Path) -> None:
    TensorSource.open(_write(tmp_path, "safetensors")).require({"a.weight": (6, 4), "c.bias": (7,)})


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("z", (1, 2), r"z: got no such tensor; expected shape \[1, 2\]"),
        ("a.weight", (4, 6), r"model.safetensors: a.weight: got shape \[6, 4\]; expected \[4, 6\]"),
        ("d.ids", (4,), r"model.safetensors: d.ids: got dtype int8; expected one of float16"),
    ],
)
def test_require_names_file_tensor_and_expectation(
    tmp_path: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        TensorSource.open(_write(tmp_path, "safetensors")).require({name: shape})


def test_float8_is_not_taken_for_weights(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    source = TensorSource.open(tmp_path)
    assert source.dtype("a") == "float8_e4m3fn"
    with pytest.raises(CheckpointError, match="use unquantized weights"):
        source.require({"a": (2, 2)})


def _expect_one_line(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        TensorSource.open(path)
    assert "\n" not in str(caught.value)


def test_nothing_to_open(tmp_path: Path) -> None:
    _expect_one_line(tmp_path / "absent", "absent: got no such file or directory")
    _expect_one_line(tmp_path, "got an empty directory")
    (tmp_path / "config.json").write_text("{}")
    _expect_one_line(tmp_path, "got config.json; expected one of model.safetensors")
    (tmp_path / "weights.gguf").write_bytes(b"GGUF")
    _expect_one_line(tmp_path / "weights.gguf", r"got a \.gguf file")
    save_file({}, tmp_path / "model.safetensors")
    _expect_one_line(tmp_path, "got no tensors")


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_truncated_files(tmp_path: Path, layout: str, keep: int) -> None:
    _write(tmp_path, layout)
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:keep])
    _expect_one_line(tmp_path, file.name)


def test_corrupt_headers(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 12) + b"not { json ]")
    _expect_one_line(tmp_path, "an unreadable file")
    file.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    _expect_one_line(tmp_path, "an unreadable file")
    _write(tmp_path, "safetensors")
    file.write_bytes(file.read_bytes().replace(b'"shape":[6,4]', b'"shape":[9,4]'))
    _expect_one_line(tmp_path, "an unreadable file")


def test_a_file_that_goes_away_after_opening(tmp_path: Path) -> None:
    for layout in ("safetensors", "bin"):
        source = TensorSource.open(_write(tmp_path / layout, layout))
        shutil.rmtree(tmp_path / layout)
        with pytest.raises(CheckpointError):
            source.read("a.weight")


class _Bomb:
    """Unpickled by the plain unpickler it makes a directory."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_that_runs_code_is_refused_unrun(tmp_path: Path) -> None:
    marker, file = tmp_path / "marker", tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(2), "b": _Bomb(marker)}, file)
    _expect_one_line(tmp_path, "a pickle that cannot be read safely")
    assert not marker.exists()
    file.write_bytes(pickle.dumps(_Bomb(marker)))
    _expect_one_line(tmp_path, "a pickle that cannot be read safely")
    assert not marker.exists()
    torch.load(_bomb_copy(file, marker), weights_only=False)
    assert marker.exists(), "the bomb is no bomb: this test could not fail"


def _bomb_copy(file: Path, marker: Path) -> Path:
    torch.save(_Bomb(marker), file)
    return file


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([torch.ones(1)], "a pickled list"),
        ({"state_dict": {"a": torch.ones(1)}}, "state_dict: got a dict; expected a dense tensor"),
        ({1: torch.ones(1)}, "1: got a name that is no text; expected a dense tensor"),
        ({"a": torch.ones(2, 2).to_sparse()}, "a: got a sparse or nested tensor; expected a dense tensor"),
        ({"a": torch.ones(2, device="meta")}, "a: got a tensor whose values are not all stored"),
        ({"a": torch.ones(1).expand(2**40)}, "a: got a tensor whose values are not all stored"),
    ],
)
def test_pickles_of_something_else(tmp_path: Path, body: object, message: str) -> None:
    torch.save(body, tmp_path / "x.pt")
    _expect_one_line(tmp_path / "x.pt", message)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_has_no_shape(tmp_path: Path) -> None:
    torch.save({"a": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, tmp_path / "x.pt")
    _expect_one_line(tmp_path / "x.pt", "a: got a sparse or nested tensor")


def test_views_and_parameters_of_a_pickle(tmp_path: Path) -> None:
    """What training scripts save besides plain tensors."""
    weight = torch.randn(4, 6)
    body = {"turned": weight.T, "rows": weight[1:3], "trained": torch.nn.Parameter(weight), "tied": weight}
    torch.save(body, tmp_path / "x.pt")
    source = TensorSource.open(tmp_path / "x.pt")
    assert all(torch.equal(source.read(name), tensor) for name, tensor in body.items())


def test_the_reason_why_a_pickle_is_refused(tmp_path: Path) -> None:
    """Never torch's advice to read it all the same."""
    file = tmp_path / "x.pt"
    torch.save({"a": _Bomb(tmp_path / "marker")}, file)
    _expect_one_line(file, r"\(it asks for posix\.mkdir\); expected plain tensors; convert it to safetensors$")
    torch.save({"a": torch.ones(1)}, file, _use_new_zipfile_serialization=False)
    _expect_one_line(file, r"\(it is not the zip file that torch\.save writes since 1\.6\)")


@pytest.mark.timeout(60, method="thread")  # an opened FIFO waits, out of the reach of signals
def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    os.mkfifo(file)
    _expect_one_line(file, "model.safetensors: got a FIFO; expected a file with weights")
    _expect_one_line(tmp_path, "model.safetensors: got a FIFO")
    file.unlink()
    file.symlink_to("absent")
    _expect_one_line(tmp_path, "model.safetensors: got a link to nothing")
    file.unlink()
    file.symlink_to(file.name)
    _expect_one_line(tmp_path, "model.safetensors: got a path that cannot be read")
    file.unlink()
    file.mkdir()
    _expect_one_line(tmp_path, "model.safetensors: got a directory; expected a file with weights")


def _edit_index(directory: Path, **weight_map: str | None) -> None:
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    for name, shard in weight_map.items():
        index["weight_map"].pop(name.replace("__", "."), None)
        if shard is not None:
            index["weight_map"][name.replace("__", ".")] = shard
    file.write_text(json.dumps(index))


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a__weight": "model-00009.safetensors"}, r"shard model-00009.safetensors: got no such file or directory"),
        ({"a__weight": "a" * 300}, r"got a path that cannot be read \(File name too long\)"),
        ({"a__weight": "../model.safetensors"}, r"a file name in the same directory"),
        ({"a__weight": "/etc/passwd"}, r"a file name in the same directory"),
        ({"a__weight": "sub/model.safetensors"}, r"a file name in the same directory"),
        ({"a__weight": "..\\x.safetensors"}, r"a file name in the same directory"),
        ({"a__weight": ".."}, r"a file name in the same directory"),
        ({"a__weight": ""}, r"a file name in the same directory"),
        ({"a__weight": "a\0.safetensors"}, r"a file name in the same directory"),
        ({"a__weight": "model.safetensors.index.json"}, r"shard model.safetensors.index.json"),
        ({"a__weight": SECOND}, rf"a\.weight: got it in {FIRST}; expected {SECOND}"),
        ({"new__weight": SECOND}, rf"new\.weight: got it in no shard; expected {SECOND}"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, change: dict[str, str | None], message: str) -> None:
    _write(tmp_path, "sharded safetensors")
    _edit_index(tmp_path, **change)
    _expect_one_line(tmp_path, message)


def test_a_tensor_that_the_index_does_not_list(tmp_path: Path) -> None:
    """transformers reads whole shards."""
    _write(tmp_path, "sharded safetensors")
    _edit_index(tmp_path, a__weight=None)
    assert torch.equal(TensorSource.open(tmp_path).read("a.weight"), _tensors()["a.weight"])


def test_a_copy_that_the_index_does_not_mean(tmp_path: Path) -> None:
    """The last copy is what transformers keeps; the index says the same."""
    _write(tmp_path, "sharded safetensors")
    save_file({**dict(list(_tensors().items())[2:]), "a.weight": torch.full((6, 4), 7.0)}, tmp_path / SECOND)
    _edit_index(tmp_path, a__weight=SECOND)
    assert torch.equal(TensorSource.open(tmp_path).read("a.weight"), torch.full((6, 4), 7.0))


def test_other_names(tmp_path: Path) -> None:
    _write(tmp_path, "sharded safetensors")
    source = TensorSource.open(tmp_path).renamed({"a.weight": "z.weight"})
    assert torch.equal(source.read("z.weight"), _tensors()["a.weight"])
    assert torch.equal(source.read_rows("z.weight", 1, 3), _tensors()["a.weight"][1:3])
    assert "a.weight" not in source
    other = next(name for name in source.names if name != "z.weight")
    with pytest.raises(CheckpointError, match="which are both"):
        source.renamed({other: "z.weight"})


def test_a_shard_that_is_no_string(tmp_path: Path) -> None:
    _write(tmp_path, "sharded safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    _expect_one_line(tmp_path, "a file name in the same directory")


def test_the_same_tensor_in_two_shards(tmp_path: Path) -> None:
    _write(tmp_path, "sharded safetensors")
    save_file({**dict(list(_tensors().items())[2:]), "a.weight": torch.ones(6, 4)}, tmp_path / SECOND)
    _expect_one_line(tmp_path, rf"{SECOND}: a\.weight: got it again, after {FIRST}")


@pytest.mark.parametrize("text", [b"\xff\xfe{}", b"{", b"[]", b"{}", b'{"weight_map": {}}', b'{"weight_map": []}'])
def test_an_index_that_is_no_index(tmp_path: Path, text: bytes) -> None:
    _write(tmp_path, "sharded safetensors")
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    _expect_one_line(tmp_path, "model.safetensors.index.json")


def test_hub_cache_links_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = _write(tmp_path / "blobs", "sharded safetensors"), tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("..") / "blobs" / file.name)
    assert torch.equal(TensorSource.open(snapshot).read("a.weight"), _tensors()["a.weight"])


def test_rows_of_a_file_that_changed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0).reshape(3, 2), "b": torch.ones(2)}, path)
    source = TensorSource.open(path)
    assert source.read_rows("a", 1, 3).tolist() == [[2.0, 3.0], [4.0, 5.0]]
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError, match="it has changed since it was opened"):
        source.read_rows("a", 0, 1)
