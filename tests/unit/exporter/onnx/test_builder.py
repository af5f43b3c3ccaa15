"""The graph builder: what is stored comes back bit by bit, and a failed write leaves no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper

from medusa_export.exporter.onnx.builder import ALIGNMENT, ExternalData, GraphBuilder

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32, torch.int64,
]  # fmt: skip


@contextmanager
def new(path: Path) -> Iterator[GraphBuilder]:
    """A graph with a data file of its own beside it."""
    data = ExternalData(path.with_name(f"{path.name}.data"))
    with data, GraphBuilder(path, "test", data) as graph:
        yield graph


def write(path: Path) -> dict[str, torch.Tensor]:
    """A graph that adds two large initializers to its input; returns what was stored."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"w{i}": torch.randn(33, 17, generator=generator).mul(20).to(dtype) for i, dtype in enumerate(DTYPES)}
    with GraphBuilder(path, "test") as graph:
        x = graph.input("x", TensorProto.FLOAT, ["N", 17])
        for name, tensor in tensors.items():
            graph.tensor(name, tensor)
        shape = graph.ints(33, 17)
        assert shape == graph.ints(33, 17)
        graph.node("Add", [graph.node("Reshape", [x, shape]), "w0"], ["y"])
        graph.output("y", TensorProto.FLOAT, [33, 17])
    return tensors | {"int64_33_17": torch.tensor([33, 17])}


def test_initializers_come_back(tmp_path: Path) -> None:
    tensors = write(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert numpy_helper.to_array(stored[name]).tobytes() == tensor.view(torch.uint8).numpy().tobytes(), name
        assert tuple(stored[name].dims) == tensor.shape


def test_the_model_is_valid_and_runs(tmp_path: Path, open_session: Callable[..., Any]) -> None:
    tensors = write(tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    session = open_session(tmp_path / "model.onnx")
    x = np.ones((33, 17), dtype=np.float32)
    assert np.array_equal(session.run(["y"], {"x": x})[0], x + tensors["w0"].numpy())


def test_external_data_is_page_aligned_and_small_tensors_are_inline(tmp_path: Path) -> None:
    tensors = write(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data} for tensor in model.graph.initializer
    }
    outside = {name: place for name, place in places.items() if place}
    assert outside.keys() == {name for name, tensor in tensors.items() if tensor.nbytes > 1024}
    assert 0 < len(outside) < len(tensors)
    ends = [0]
    for name, place in outside.items():
        assert place["location"] == "model.onnx.data", "a relative name, or the directory could not be moved"
        assert int(place["offset"]) % ALIGNMENT == 0
        assert int(place["offset"]) >= ends[-1]
        assert int(place["length"]) == tensors[name].nbytes
        ends.append(int(place["offset"]) + int(place["length"]))
    assert (tmp_path / "model.onnx.data").stat().st_size == ends[-1]


def test_a_name_is_stored_once_and_views_are_copied(tmp_path: Path) -> None:
    table = torch.arange(4000, dtype=torch.float32).reshape(40, 100)
    with new(tmp_path / "model.onnx") as graph:
        assert graph.tensor("table", table.T) == graph.tensor("table", table.T) == "table"
        graph.output("table", TensorProto.FLOAT, [100, 40])
    (stored,) = onnx.load(tmp_path / "model.onnx").graph.initializer
    assert np.array_equal(numpy_helper.to_array(stored), table.numpy().T)
    assert (tmp_path / "model.onnx.data").stat().st_size == table.nbytes


def test_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "model.onnx")
    for file in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_several_outputs(tmp_path: Path, open_session: Callable[..., Any]) -> None:
    with new(tmp_path / "model.onnx") as graph:
        x = graph.input("x", TensorProto.FLOAT, [6])
        first, second = graph.node("Split", [x], 2, axis=0, num_outputs=2)
        assert first != second
        graph.node("Sub", [second, first], ["y"])
        graph.output("y", TensorProto.FLOAT, [3])
    session = open_session(tmp_path / "model.onnx")
    assert session.run(["y"], {"x": np.arange(6, dtype=np.float32)})[0].tolist() == [3, 3, 3]


def test_graphs_share_a_data_file(tmp_path: Path, open_session: Callable[..., Any]) -> None:
    table, other = torch.arange(600, dtype=torch.float32), torch.ones(600)
    with ExternalData(tmp_path / "shared.data") as data:
        for name, own in (("a", table), ("b", other)):
            with GraphBuilder(tmp_path / f"{name}.onnx", name, data) as graph:
                graph.node("Add", [graph.tensor("table", table), graph.tensor(name, own)], ["y"])
                graph.output("y", TensorProto.FLOAT, [600])
    assert (tmp_path / "shared.data").stat().st_size == 2 * ALIGNMENT + table.nbytes  # of 2400 bytes each, a page apart
    for name, own in (("a", table), ("b", other)):
        assert np.array_equal(open_session(tmp_path / f"{name}.onnx").run(["y"], {})[0], (table + own).numpy())
        stored = onnx.load(tmp_path / f"{name}.onnx", load_external_data=False).graph.initializer
        assert {tensor.name for tensor in stored} == {"table", name}


def test_a_failure_leaves_no_model(tmp_path: Path) -> None:
    def fail() -> None:
        with new(tmp_path / "model.onnx") as graph:
            graph.input("x", TensorProto.FLOAT, [1])
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        fail()
    assert not (tmp_path / "model.onnx").exists()


def test_graphs_share_one_data_file(tmp_path: Path) -> None:
    table = torch.arange(4000, dtype=torch.float32).reshape(40, 100)
    with ExternalData(tmp_path / "shared.data") as data:
        for name in ("a", "b"):
            with GraphBuilder(tmp_path / f"{name}.onnx", name, data) as graph:
                graph.tensor("table", table)
                if name == "b":
                    graph.tensor("more", table + 1)
    stored = {name: onnx.load(tmp_path / f"{name}.onnx").graph.initializer for name in ("a", "b")}
    assert [tensor.name for tensor in stored["a"]] == ["table"], "only what the graph uses"
    assert [tensor.name for tensor in stored["b"]] == ["table", "more"]
    assert np.array_equal(numpy_helper.to_array(stored["b"][0]), table.numpy())
    assert np.array_equal(numpy_helper.to_array(stored["b"][1]), table.numpy() + 1)
    assert (tmp_path / "shared.data").stat().st_size < 2 * table.nbytes + 2 * ALIGNMENT
