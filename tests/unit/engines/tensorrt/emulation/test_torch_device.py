"""Portable graphs in PyTorch, against the oracle and against ONNX Runtime on the very same files; on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medusa_export.core.errors import ConfigError
from medusa_export.engines.decoding.generate import generate
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE
from medusa_export.engines.tensorrt.build import DECODER_ENGINE
from medusa_export.engines.tensorrt.emulation.onnx_device import OnnxDevice
from medusa_export.engines.tensorrt.emulation.torch_device import TorchDevice
from medusa_export.engines.tensorrt.engine import TensorRtEngine
from medusa_export.exporter.onnx.builder import GraphBuilder
from medusa_export.heads.checkpoint.medusa_checkpoint import load_reference
from medusa_export.heads.decoding.reference import greedy, medusa_decode
from medusa_export.heads.trees.tree import load_tree

PROMPT = [1, 40, 7, 7, 61, 12, 90, 3, 55, 28]
SIZES = {"hidden_size": 128, "intermediate_size": 256}


def open_torch(written: Any, *, fp8_products: bool = True) -> TensorRtEngine:
    return TensorRtEngine(written.engine_dir, TorchDevice(written.onnx_dir, "cpu", fp8_products=fp8_products))


def logits(engine: TensorRtEngine) -> Any:
    return np.concatenate(list(engine.score([*PROMPT, *range(60, 90)], chunk=7)))  # [S, V]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_decoding_is_the_oracles(family: str, portable: Callable[..., Any]) -> None:
    written = portable(family, "float32")
    engine, tree = open_torch(written), load_tree("cpu-8")
    model = load_reference(written.model_dir, torch.float32)
    plain = generate(engine, PROMPT, AUTOREGRESSIVE, max_new_tokens=24, eos_token_ids=())
    with_tree = generate(engine, PROMPT, tree, max_new_tokens=24, eos_token_ids=())
    tokens, accepted = medusa_decode(model, written.checkpoint, PROMPT, tree, max_new_tokens=24, eos_token_ids=())
    assert plain.tokens == greedy(model, PROMPT, max_new_tokens=24, eos_token_ids=()) == tokens == with_tree.tokens
    assert with_tree.accepted == accepted
    assert max(accepted) > 2, "paths are accepted, so rows are moved"


@pytest.mark.parametrize(
    "quant", ["none", "fp8", "fp8_rowwise", "int8_sq", "int8_wo", "int4_wo", "int4_awq"]
)  # the forms that torch has numbers for
def test_every_form_is_onnx_runtimes(quant: str, portable: Callable[..., Any]) -> None:
    written = portable("llama", "float32", quant, **SIZES)
    wanted = logits(TensorRtEngine(written.engine_dir, OnnxDevice(written.onnx_dir)))
    found = logits(open_torch(written, fp8_products=False))
    # A value between two codes may fall either way, and moves all that follows it.
    np.testing.assert_allclose(found, wanted, atol=(0.05 if quant in ("fp8", "int8_sq") else 1e-3) * wanted.std())


def test_fp8_products(portable: Callable[..., Any]) -> None:
    """By torch's FP8 kernel, here the CPU's: the same numbers as products of what the codes stand for."""
    written = portable("qwen2", "float32", "fp8", **SIZES)
    device = TorchDevice(written.onnx_dir, "cpu", fp8_products=True)
    engine = TensorRtEngine(written.engine_dir, device)
    graph = device.graphs[DECODER_ENGINE]
    assert (graph.fp8_products, graph.dequantized) == (5 * engine.info.num_hidden_layers, 0)
    wanted = logits(open_torch(written, fp8_products=False))
    np.testing.assert_allclose(logits(engine), wanted, atol=0.05 * wanted.std())
    tree = load_tree("cpu-8")
    plain, with_tree = (
        generate(engine, PROMPT, mode, max_new_tokens=24, eos_token_ids=()).tokens for mode in (AUTOREGRESSIVE, tree)
    )
    assert plain == with_tree


def test_the_bytes_of_a_step(portable: Callable[..., Any]) -> None:
    """What a step reads whole: FP8 weights a byte each, the projection, and no embedding, of which it picks rows."""
    held = {}
    for quant in ("none", "fp8"):
        written = portable("llama", "float16", quant, **SIZES)
        device = TorchDevice(written.onnx_dir, "cpu", fp8_products=True)
        held[quant] = device.load(DECODER_ENGINE).weight_bytes
    shapes = {name: written.checkpoint.shape(name) for name in written.checkpoint.names}
    linears = sum(np.prod(shape) for name, shape in shapes.items() if name.endswith("proj.weight"))
    assert held["none"] - held["fp8"] == pytest.approx(linears, rel=0.01)
    assert held["none"] == pytest.approx(2 * (linears + np.prod(shapes["lm_head.weight"])), rel=0.02)


def test_sides_that_the_kernel_does_not_take(portable: Callable[..., Any]) -> None:
    """They are multiplied as what they stand for, and counted."""
    written = portable("llama", "float32", "fp8", hidden_size=128, intermediate_size=200)
    graph = TorchDevice(written.onnx_dir, "cpu", fp8_products=True).load(DECODER_ENGINE)
    layers = written.checkpoint.config.num_hidden_layers
    assert (graph.fp8_products, graph.dequantized) == (2 * layers, 3 * layers)


def test_what_it_does_not_know(portable: Callable[..., Any], tmp_path: Path) -> None:
    from onnx import TensorProto

    written = portable("llama", "float16", "nvfp4", **SIZES)
    with pytest.raises(ConfigError, match="got FLOAT4E2M1"):
        TorchDevice(written.onnx_dir, "cpu", fp8_products=True).load(DECODER_ENGINE)
    with GraphBuilder(tmp_path / "decoder.onnx", "small", opsets={"": 24}) as graph:
        graph.input("x", TensorProto.FLOAT, [1])
        graph.node("Erf", ["x"], ["y"])
        graph.output("y", TensorProto.FLOAT, [1])
    with pytest.raises(ConfigError, match=r"operators \['Erf'\]"):
        TorchDevice(tmp_path, "cpu", fp8_products=True).load(DECODER_ENGINE)
