"""The code path of data-centre TensorRT, on a stand-in (TensorRT-RTX under its name), and what a refused graph says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from onnx import TensorProto

from medusa_export.core.errors import ConfigError
from medusa_export.engines.tensorrt.build import BuildRequest, TensorRtBuilder, build_engine, refused_graph
from medusa_export.engines.tensorrt.library import DATA_CENTRE, RTX, TensorRtLibrary, find_tensorrt, import_tensorrt
from medusa_export.exporter.onnx.builder import GraphBuilder

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has wheels for Linux and Windows on x86-64 only")


def write_graph(path: Path, op: str = "Sigmoid") -> Path:
    with GraphBuilder(path, "small", opsets={"": 24}) as graph:
        graph.input("hidden_states", TensorProto.FLOAT16, [1, 8])
        graph.node(op, ["hidden_states"], ["draft_ids"])
        graph.output("draft_ids", TensorProto.FLOAT16, [1, 8])
    return path


@pytest.fixture
def data_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an H100 and the tensorrt package; what builds is TensorRT-RTX, whose API it has."""
    import tensorrt_rtx_bindings

    monkeypatch.setitem(sys.modules, DATA_CENTRE, tensorrt_rtx_bindings)
    monkeypatch.setattr("medusa_export.engines.tensorrt.build.local_gpu", lambda: 90)


@pytest.mark.usefixtures("data_centre")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_gpu_here_is_built_for_with_kept_timings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDUSA_EXPORT_CACHE", str(tmp_path / "cache"))
    for name in ("onnx", "engine"):
        (tmp_path / name).mkdir()
    write_graph(tmp_path / "onnx" / "decoder.onnx")
    builder = TensorRtBuilder()
    builder.require((90,))
    for _ in range(2):
        builder.build(
            tmp_path / "onnx", tmp_path / "engine", lambda *step: None, gpus=(90,), max_length=64, max_nodes=64, nodes=4
        )  # fmt: skip
    body = json.loads((tmp_path / "engine" / "rank0.json").read_text())
    assert (body["library"]["name"], body["gpus"], body["ahead_of_time"]) == ("tensorrt", ["sm90"], False)
    (timings,) = (tmp_path / "cache" / "tensorrt").iterdir()
    assert timings.name.endswith("-sm90.timing")
    assert not (tmp_path / "engine" / "heads.engine").exists(), "a base model has no heads"


@pytest.mark.usefixtures("data_centre")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_timing_cache_that_cannot_be_kept_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where a directory should be")
    monkeypatch.setenv("MEDUSA_EXPORT_CACHE", str(tmp_path / "cache"))
    graph = write_graph(tmp_path / "decoder.onnx")
    request = BuildRequest((90,), max_length=64, max_nodes=64, nodes=4)
    build_engine(graph, tmp_path / "rank0.engine", find_tensorrt((90,), 90), request, lambda *step: None)
    assert (tmp_path / "rank0.engine").stat().st_size > 0
    assert "the timings are not kept" in caplog.text


def test_a_refused_graph_is_explained(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "decoder.onnx", "NoSuchOperator")
    rtx = import_tensorrt(RTX)
    assert rtx is not None
    request = BuildRequest((89,), max_length=64, max_nodes=64, nodes=4)
    with pytest.raises(ConfigError, match=r"decoder\.onnx: got tensorrt_rtx 1\..*NoSuchOperator.*take another --quant"):
        build_engine(graph, tmp_path / "rank0.engine", rtx, request, lambda *step: None)
    assert not (tmp_path / "rank0.engine").exists()


@pytest.mark.parametrize(
    ("said", "action"),
    [
        ("[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)", "a smaller --max-length"),
        ("Error Code 10: Could not find any implementation for node {ForeignNode}", "has no kernel for the operator"),
        ("something else", "--engine onnxruntime or tensorrt-llm"),
    ],
)
def test_what_to_do_follows_from_what_tensorrt_says(said: str, action: str) -> None:
    module = ModuleType("tensorrt")
    module.__dict__["__version__"] = "10.0"
    error = refused_graph(Path("decoder.onnx"), TensorRtLibrary("tensorrt", module), [said])
    assert action in error.action
    assert said in error.got


@pytest.mark.parametrize("raised", [SystemExit(130), OSError("no terminal")])
def test_what_is_raised_during_a_build_is_not_lost(raised: BaseException, tmp_path: Path) -> None:
    """TensorRT calls back from its own code, which drops exceptions."""
    rtx = import_tensorrt(RTX)
    assert rtx is not None

    def fails(*step: object) -> None:
        raise raised

    request = BuildRequest((89,), max_length=64, max_nodes=64, nodes=4)
    with pytest.raises(type(raised), match=str(raised)):
        build_engine(write_graph(tmp_path / "decoder.onnx"), tmp_path / "rank0.engine", rtx, request, fails)
    assert not (tmp_path / "rank0.engine").exists()


def test_networks_are_strongly_typed(tmp_path: Path) -> None:
    """Or TensorRT would choose types of its own."""
    import tensorrt_rtx_bindings as trt

    seen: list[int] = []

    class Recording(trt.Builder):
        def create_network(self, flags: int) -> object:
            seen.append(flags)
            return super().create_network(flags)

    module = ModuleType("recording")
    module.__dict__.update({name: getattr(trt, name) for name in dir(trt)} | {"Builder": Recording})
    request = BuildRequest((89,), max_length=64, max_nodes=64, nodes=4)
    build_engine(
        write_graph(tmp_path / "decoder.onnx"),
        tmp_path / "rank0.engine",
        TensorRtLibrary(RTX, module),
        request,
        lambda *step: None,
    )
    assert seen == [1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)]


def test_profiles() -> None:
    profiles = BuildRequest((89,), max_length=2048, max_nodes=64, nodes=26).profiles
    assert profiles == {"prefill": {"S": (1, 512, 2048), "R": (1, 1, 1)}, "step": {"S": (1, 26, 64), "R": (1, 26, 64)}}
    assert BuildRequest((89,), max_length=16, max_nodes=64, nodes=26).profiles["step"]["S"] == (1, 16, 16)
