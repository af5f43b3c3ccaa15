from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from medusa_export.core.errors import InternalError, OutputError
from medusa_export.exporter.write.safetensors import SafetensorsWriter


@dataclass(frozen=True)
class Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]


TENSORS = {
    "half": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "fp8": torch.tensor([1.5, -448.0, 0.0]).to(torch.float8_e4m3fn),
    "scale": torch.tensor([0.25]),
    "brain": torch.tensor([[1.0], [2.0]], dtype=torch.bfloat16),
    "int": torch.tensor([-128, 127], dtype=torch.int8),
    "nothing": torch.zeros(0, 4),
}
ENTRIES = [Entry(name, str(x.dtype).removeprefix("torch."), tuple(x.shape)) for name, x in TENSORS.items()]


def write(path: Path, tensors: dict[str, torch.Tensor] = TENSORS) -> Path:
    with SafetensorsWriter(path, ENTRIES, {"format": "pt"}) as writer:
        for entry in writer.entries:
            writer.write(tensors[entry.name])
    return path


def test_safetensors_reads_it_back(tmp_path: Path) -> None:
    loaded = load_file(write(tmp_path / "a.safetensors"))
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8))


def test_header_and_tensors_are_aligned(tmp_path: Path) -> None:
    data = write(tmp_path / "a.safetensors").read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0
    with SafetensorsWriter(tmp_path / "b.safetensors", []) as writer:
        assert writer.entries == []
    sizes = [TENSORS[entry.name].element_size() for entry in SafetensorsWriter(tmp_path / "c", ENTRIES).entries]
    assert sizes == sorted(sizes, reverse=True)


def test_deterministic(tmp_path: Path) -> None:
    assert write(tmp_path / "a").read_bytes() == write(tmp_path / "b").read_bytes()


def test_a_view_is_written_as_what_it_shows(tmp_path: Path) -> None:
    turned = {**TENSORS, "half": TENSORS["half"].T.contiguous().T}
    assert write(tmp_path / "a", turned).read_bytes() == write(tmp_path / "b").read_bytes()


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.float16)])
def test_refuses_what_was_not_planned(wrong: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(InternalError, match=r"half.*float16 \[2, 3\]"):
        write(tmp_path / "a", {**TENSORS, "half": wrong})


def test_refuses_to_leave_one_out(tmp_path: Path) -> None:
    with (
        pytest.raises(InternalError, match="no b"),
        SafetensorsWriter(tmp_path / "x", [Entry("a", "float32", (1,)), Entry("b", "float32", (1,))]) as writer,
    ):
        writer.write(torch.zeros(1))


def test_refuses_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="too many"), SafetensorsWriter(tmp_path / "x", []) as writer:
        writer.write(torch.zeros(1))


def test_keeps_the_error_of_the_body(tmp_path: Path) -> None:
    with pytest.raises(KeyError), SafetensorsWriter(tmp_path / "x", ENTRIES):
        raise KeyError("from reading the source")


def test_refuses_a_name_twice_and_an_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="twice"):
        SafetensorsWriter(tmp_path / "x", [ENTRIES[0], ENTRIES[0]])
    with pytest.raises(InternalError, match="complex64"):
        SafetensorsWriter(tmp_path / "x", [Entry("a", "complex64", (1,))])


def test_names_the_disk(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"), SafetensorsWriter(tmp_path / "no" / "x", []):
        pass


def test_a_full_disk(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    big = Entry("big", "float32", (1 << 20,))
    with (
        pytest.raises(OutputError, match="No space left"),
        SafetensorsWriter(Path("/dev/full"), [big]) as writer,
    ):
        writer.write(torch.zeros(1 << 20))
