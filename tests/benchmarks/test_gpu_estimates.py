"""The roofline against published figures: a regression table. A change of the model or of a default that moves one is seen here."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from medusa_export.exporter.job.gpu_costs import Target
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.roofline.gpus import BY_KEY
from medusa_export.quantize.formats import FORMATS
from tests.unit.heads.roofline.test_shape import LLAMA_8B

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
# Published: (estimate, whether it is within 15 %). Those that are not are explained in docs/gpu-estimates.md.
EXPECTED = {
    ("Vicuna 7B", "A100-80GB PCIe", 1.22): (1.059, True),
    ("Vicuna 13B", "A100-80GB PCIe", 1.23): (1.069, True),
    ("Vicuna 33B", "A100-80GB PCIe", 1.27): (1.043, False),
    ("Zephyr 7B", "A100-80GB PCIe", 1.18): (1.059, True),
    ("Vicuna 7B", "RTX-3090-24GB", 1.61): (1.195, False),
    ("Vicuna 7B", "A100-80GB", 1.30): (1.056, False),
    ("Vicuna 13B", "A100-80GB", 1.37): (1.069, False),
    ("Vicuna 33B", "A100-80GB", 1.30): (1.043, False),
    ("Llama 3.1 70B", "H200-141GB", 178.67): (168.2, True),
    ("Llama 3.1 405B", "H200-141GB", 56.84): (52.7, True),
}
VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "unsqueeze", "expand", "slice", "reshape", "select", "alias", "detach", "permute",
    "squeeze", "split", "chunk", "_reshape_alias", "empty",
}  # fmt: skip


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(FOLDER))
    return runpy.run_path(str(FOLDER / "gpu_estimates.py"))


def test_published_points(script: dict[str, Any]) -> None:
    found = {}
    for held in map(script["hold"], script["POINTS"]):
        point = held.point
        found[point.model, point.gpu.name, round(point.published, 2)] = (held.estimate, abs(held.error) <= 0.15)
        assert held.low <= held.estimate <= held.high
        assert held.low <= point.published <= held.high, point  # the range says how far off it can be
    assert found.keys() == EXPECTED.keys()
    for key, (estimate, near) in EXPECTED.items():
        assert found[key][0] == pytest.approx(estimate, rel=5e-3), key
        assert found[key][1] == near, key


def test_the_tables_in_the_document_are_the_scripts(script: dict[str, Any]) -> None:
    document = (FOLDER.parent / "docs" / "gpu-estimates.md").read_text(encoding="utf-8")
    held = [script["hold"](point) for point in script["POINTS"]]
    assert script["markdown"](held) in document
    assert script["speedups"](held) in document


def test_the_plot(script: dict[str, Any], tmp_path: Path) -> None:
    script["draw"](tmp_path / "plot.svg", [script["hold"](point) for point in script["POINTS"]])
    text = (tmp_path / "plot.svg").read_text()
    assert "Vicuna 33B" in text
    assert "Spec-Bench" in text


class Counter(TorchDispatchMode):
    """Counts operators that are kernels on a GPU."""

    kernels = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.kernels += function.__name__.split(".")[0] not in VIEWS
        return function(*args, **(kwargs or {}))


def test_kernels_of_a_step_in_eager_pytorch(script: dict[str, Any]) -> None:
    """What gpu_published.py takes a layer of transformers' Llama to launch, and what is around the layers."""
    counts = []
    for layers in (1, 2):
        config = LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
            vocab_size=97, attn_implementation="eager",
        )  # fmt: skip
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16).eval()
        with torch.no_grad():
            past = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
            with Counter() as counter:
                model(torch.tensor([[4]]), past_key_values=past, use_cache=True)
        counts.append(counter.kernels)
    eager = script["POINTS"][0].assumptions
    layer = counts[1] - counts[0]
    assert layer == pytest.approx(
        eager.layer_kernels, abs=5
    )  # other releases of transformers launch a few more or less
    assert counts[0] - layer == pytest.approx(eager.base_kernels, abs=10)


def test_a_measured_curve_beside_its_estimate(monkeypatch: pytest.MonkeyPatch, script: dict[str, Any]) -> None:
    parts = runpy.run_path(str(FOLDER / "gpu_parts.py"))
    for name, key in {
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100-80gb", "NVIDIA A100-SXM4-40GB": "a100-40gb",
        "NVIDIA GeForce RTX 4090": "rtx4090", "NVIDIA L40S": "l40s", "NVIDIA H200": "h200",
    }.items():  # fmt: skip
        assert parts["known_gpu"](name) == BY_KEY[key]
    assert parts["known_gpu"]("Tesla T4") is None
    curve = {"batch": 1, "past_length": 256, "verify": [{"nodes": 1, "ms": 8.0}, {"nodes": 64, "ms": 10.0}]}
    target = Target(DecoderConfig.from_dict(LLAMA_8B), 0, 0, FORMATS["none"])
    one, many = parts["estimate_rows"](curve, target, BY_KEY["h100"])
    assert (one["measured_ratio"], many["measured_ratio"]) == (1.0, 1.25)
    assert one["estimate_ratio"] == 1.0 < many["estimate_ratio"] < 1.25
    assert 5 < one["estimate_ms"] < 8
    body = {"parts": {"shape llama-3.1-8b none": {"costs": {"estimate": [one, many]}}, "ptq": {}}}
    assert "| shape llama-3.1-8b none | 64 | 10.00 |" in script["measured_table"](body)
