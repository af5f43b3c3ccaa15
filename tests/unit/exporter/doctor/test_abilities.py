"""What can be done with which packages and GPUs."""

from __future__ import annotations

import pytest

from medusa_export.exporter.doctor.abilities import ENGINES, GPU, abilities, checkpoint_lacks, runs_on, to_install
from medusa_export.exporter.doctor.packages import PACKAGES, Found
from medusa_export.quantize.formats import FORMATS


def having(*names: str) -> dict[str, Found]:
    return {name: Found("1", name in names) for name in PACKAGES}


def test_every_ability_is_named_once_and_stands_on_known_packages() -> None:
    names = [each.name for each in abilities()]
    assert len(set(names)) == len(names)
    assert {name for each in abilities() for some in each.needs for name in some} <= PACKAGES.keys()


def test_calibration_is_missing_where_a_format_needs_it() -> None:
    torch = having("PyTorch")
    assert checkpoint_lacks(FORMATS["fp8"], torch) == ["ModelOpt"]
    assert checkpoint_lacks(FORMATS["fp8_rowwise"], torch) == []
    assert checkpoint_lacks(FORMATS["none"], having()) == ["PyTorch"]


def test_a_package_that_does_not_import_is_missing() -> None:
    found = having("PyTorch") | {"PyTorch": Found("1", True, "ImportError: no library")}
    assert checkpoint_lacks(FORMATS["none"], found) == ["PyTorch"]


def test_one_of_two_tensorrts_is_enough() -> None:
    make, run = ENGINES["tensorrt"].make, ENGINES["tensorrt"].run
    graph = ("PyTorch", "ONNX", "ONNX Runtime")
    assert make.missing(having(*graph), []) == ["TensorRT-RTX"]
    assert make.missing(having(*graph, "TensorRT"), []) == []
    assert run.missing(having(*graph, "TensorRT"), []) == [GPU]
    assert run.missing(having(*graph, "TensorRT"), [90]) == []


@pytest.mark.parametrize(
    ("name", "gpus", "engines"),
    [
        ("fp8", [], ["onnxruntime"]),
        ("fp8", [86], ["onnxruntime"]),
        ("fp8", [89], ["onnxruntime", "tensorrt", "tensorrt-llm"]),
        ("int4_awq", [86], ["onnxruntime", "tensorrt", "tensorrt-llm"]),
        ("int4_awq", [100], ["onnxruntime", "tensorrt"]),
        ("w4a8_awq", [90], ["onnxruntime", "tensorrt-llm"]),
        ("nvfp4", [90], []),
        ("nvfp4", [100], ["tensorrt", "tensorrt-llm"]),
    ],
)
def test_what_runs_on_which_gpu(name: str, gpus: list[int], engines: list[str]) -> None:
    assert runs_on(FORMATS[name], having(*PACKAGES), gpus) == engines


def test_one_command_for_what_comes_together() -> None:
    found = having(*(PACKAGES.keys() - {"uvicorn", "FastAPI", "Triton server"}))
    assert to_install(found, [90]) == {
        "NVIDIA's container nvcr.io/nvidia/tritonserver": ["Triton server"],
        "pip install 'medusa-export[serve]'": ["FastAPI", "uvicorn"],
    }
    assert to_install(having(*PACKAGES), [90]) == {}
