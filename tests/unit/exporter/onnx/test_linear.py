"""One linear in every form: FP8 is the TensorRT-LLM checkpoint's, byte for byte, and int8 is off by half a step at most."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from safetensors.torch import load_file

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.onnx.builder import ExternalData, GraphBuilder
from medusa_export.exporter.onnx.decoder import write_decoder
from medusa_export.exporter.onnx.linear import LinearWriter
from medusa_export.exporter.onnx.matrices import quantize_int8_blocks

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
QKV = [f"{ATTENTION}.{x}_proj" for x in "qkv"]
# name in the graph: names in the rank file of what it stacks
PAIRS = {
    f"{QKV[0]}+2": ["attention.qkv"],
    f"{ATTENTION}.o_proj": ["attention.dense"],
    f"{MLP}.gate_proj+1": ["mlp.fc", "mlp.gate"],
    f"{MLP}.down_proj": ["mlp.proj"],
}


def initializers(path: Path) -> dict[str, onnx.TensorProto]:
    """Every initializer of a graph, with its bytes."""
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


def write_linear(path: Path, linear: LinearWriter, width: int, modules: list[str]) -> None:
    """A graph of one linear: x [S, K] -> y [S, N]."""
    data = ExternalData(path.with_suffix(".data"))
    with data, GraphBuilder(path, "linear", data) as graph:
        graph.input("x", TensorProto.FLOAT, ["S", width])
        graph.node("Identity", [linear(graph, "x", modules)], ["y"])
        graph.output("y", TensorProto.FLOAT, ["S", "N"])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp8_is_the_rank_file(family: str, dtype: torch.dtype, make_case: Callable[..., Any], tmp_path: Path) -> None:
    case = make_case(family, dtype=dtype, head_dim=32)
    rank = load_file(case.write(tmp_path / "trtllm", "fp8") / "rank0.safetensors")
    write_decoder(
        tmp_path,
        case.checkpoint,
        LinearWriter(case.checkpoint, "fp8", case.scales, activations=torch.float8_e4m3fn),
        max_length=64,
    )
    graph = initializers(tmp_path / "decoder.onnx")
    for layer in range(2):
        for ours, theirs in PAIRS.items():
            name, expected = (
                ours.replace("layers.0", f"layers.{layer}"),
                [f"transformer.layers.{layer}.{x}" for x in theirs],
            )
            weight = graph[f"{name}.weight"]
            assert weight.data_type == TensorProto.FLOAT8E4M3FN
            stored = np.frombuffer(weight.raw_data, dtype=np.uint8).reshape(weight.dims)  # [K, N]
            codes = torch.cat([rank[f"{module}.weight"].view(torch.uint8) for module in expected])
            assert np.array_equal(stored.T, codes.numpy()), name
            for scale, factor in (("weight_scale", "weights"), ("input_scale", "activation")):
                factors = {rank[f"{module}.{factor}_scaling_factor"].numpy().tobytes() for module in expected}
                assert factors == {graph[f"{name}.{scale}"].raw_data}


def test_what_is_one_product(make_case: Callable[..., Any]) -> None:
    """Modules that are excluded alike; smoothed ones have inputs of their own."""
    checkpoint, pair = make_case().checkpoint, [f"{MLP}.gate_proj", f"{MLP}.up_proj"]
    assert LinearWriter(checkpoint, "fp8").takes_as_one(pair)
    assert not LinearWriter(checkpoint, "int4_awq").takes_as_one(pair)
    for excluded, is_one in ((pair[:1], False), (pair[1:], False), (pair, True)):
        assert LinearWriter(checkpoint, "int8", excluded=excluded.__contains__).takes_as_one(pair) == is_one
        assert LinearWriter(checkpoint, "int8_row", excluded=excluded.__contains__).takes_as_one(pair) == is_one
    assert LinearWriter(checkpoint, "int8_row").takes_as_one(pair), "their smoothing is in the norm"


@pytest.mark.parametrize("excluded", [(), ("up_proj",), ("down_proj",), ("gate_proj",), ("gate_proj", "up_proj")])
def test_where_smoothing_goes(excluded: tuple[str, ...], make_case: Callable[..., Any], tmp_path: Path) -> None:
    """Into the norm and up_proj's rows where all that read them are smoothed alike; else it multiplies the input."""
    case = make_case(dtype=torch.float32)
    linear = LinearWriter(
        case.checkpoint, "int8_row", case.scales, torch.int8, excluded=lambda module: module.endswith(excluded)
    )
    write_decoder(tmp_path, case.checkpoint, linear, max_length=64)
    stored = initializers(tmp_path / "decoder.onnx")
    found = {name.removeprefix(f"{MLP}.") for name in stored if name.startswith(MLP)}
    factors = {name for name in found if name.endswith(("pre_quant_scale", "output_factor"))}
    expected = {
        (): {"gate_proj+1.pre_quant_scale", "gate_proj+1.output_factor"},
        ("up_proj",): {"gate_proj.pre_quant_scale", "down_proj.pre_quant_scale"},
        ("down_proj",): {"gate_proj+1.pre_quant_scale"},
        ("gate_proj",): {"up_proj.pre_quant_scale", "up_proj.output_factor"},
        ("gate_proj", "up_proj"): {"down_proj.pre_quant_scale"},
    }
    assert factors == expected[excluded]
    nodes = onnx.load(tmp_path / "decoder.onnx").graph.node
    norms = [
        node
        for node in nodes
        if node.op_type == "Mul" and "model.layers.0.post_attention_layernorm.weight" in node.input
    ]
    assert len(norms) == (excluded in ((), ("down_proj",)))


def test_one_product_has_one_smoothing(make_case: Callable[..., Any], tmp_path: Path) -> None:
    case = make_case()
    case.scales.pre_quant_scale[f"{MLP}.up_proj"] = case.scales.pre_quant_scale[f"{MLP}.gate_proj"] * 2
    with pytest.raises(
        ConfigError, match=r"up_proj: got other factors; expected those of .*gate_proj.*calibrate again"
    ):
        write_decoder(
            tmp_path, case.checkpoint, LinearWriter(case.checkpoint, "int8_row", case.scales, torch.int8), max_length=64
        )


def test_fp8_without_scales(make_case: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="calibrate before writing"):
        write_linear(tmp_path / "x.onnx", LinearWriter(make_case().checkpoint, "fp8"), 64, QKV)
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize("form", ["float", "int8", "fp8", "fp8_row", "int8_row", "int4", "int4_awq"])
@pytest.mark.parametrize("modules", [QKV, [f"{MLP}.down_proj"]], ids=["fused", "one"])
def test_product(
    form: str, modules: list[str], make_case: Callable[..., Any], open_session: Callable[..., Any], tmp_path: Path
) -> None:
    """x W^T + b of the modules, side by side in the order given."""
    case = make_case("llama", attention_bias=True, mlp_bias=True, dtype=torch.bfloat16)
    read = case.checkpoint.read
    weight = torch.cat([read(f"{module}.weight").float() for module in modules])  # [N, K]
    bias = torch.cat([read(f"{module}.bias").float() for module in modules])
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(4))
    write_linear(
        tmp_path / "x.onnx", LinearWriter(case.checkpoint, form, case.scales, group_size=16), x.shape[1], modules
    )
    y = torch.from_numpy(open_session(tmp_path / "x.onnx", optimize=False).run(["y"], {"x": x.numpy()})[0])
    error = (y - (x @ weight.T + bias)).norm() / (x @ weight.T).norm()
    assert (
        error
        < {"float": 1e-6, "int8": 0.01, "int8_row": 0.02, "fp8": 0.05, "fp8_row": 0.05, "int4": 0.15, "int4_awq": 0.2}[
            form
        ]
    )
    assert form == "float" or error > 1e-3


def test_qwen2_has_no_bias_on_o_proj(make_case: Callable[..., Any], tmp_path: Path) -> None:
    case = make_case("qwen2", dtype=torch.float32)
    write_decoder(tmp_path, case.checkpoint, LinearWriter(case.checkpoint, "float"), max_length=64)
    biases = {name for name in initializers(tmp_path / "decoder.onnx") if name.endswith(".bias")}
    assert biases == {f"model.layers.{layer}.self_attn.q_proj+2.bias" for layer in range(2)}


class TestInt8Blocks:
    @pytest.mark.parametrize(("width", "blocks"), [(256, 2), (192, 3), (96, 3), (80, 5)])
    def test_half_a_step(self, width: int, blocks: int) -> None:
        weight = torch.randn(24, width, generator=torch.Generator().manual_seed(6))
        weight[:, :16] *= 100  # a block must not pay for another one's outliers
        values, scales = quantize_int8_blocks(weight, "w")
        assert (values.dtype, values.shape, scales.shape) == (torch.uint8, weight.shape, (24, blocks))
        step = scales.repeat_interleave(width // blocks, dim=1)
        assert ((values.float() - 128) * step - weight).abs().le(step * 0.5001).all()
        assert values.min() >= 1
        assert (values.reshape(24, blocks, -1).int() - 128).abs().amax(-1).eq(127).all(), "the whole range is used"

    def test_zeros_stay_zero(self) -> None:
        values, scales = quantize_int8_blocks(torch.zeros(2, 32), "w")
        assert values.eq(128).all()
        assert torch.isfinite(scales).all()

    def test_odd_width(self) -> None:
        with pytest.raises(ConfigError, match="down_proj: got 40 input features; expected a multiple of 16"):
            quantize_int8_blocks(torch.zeros(2, 40), "down_proj")
