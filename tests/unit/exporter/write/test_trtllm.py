"""The TensorRT-LLM checkpoint: what is written is what was read, whatever the family, format and number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medusa_export.core.errors import CheckpointError, ConfigError, OutputError, TreeError
from medusa_export.exporter.verify.checkpoint import verify_trtllm
from medusa_export.exporter.verify.rebuild import rebuild_hf
from medusa_export.exporter.write.trtllm import write_trtllm
from medusa_export.heads.trees.tree import Tree
from medusa_export.quantize.formats import FORMATS, get_format
from medusa_export.quantize.scales import Scales

HIDDEN, VOCAB = 64, 97  # of the shared fixtures
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 1}
WIDEST: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 512, "head_dim": 128, "num_hidden_layers": 1}
TREE = Tree.from_choices([[0], [0, 0]])
KV_HEADS = {"quant_heads": True, "kv_cache": "fp8"}
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {} for name in FORMATS},
    **dict.fromkeys(("fp8", "int8_sq", "nvfp4"), KV_HEADS),
    "w4a8_awq": {"kv_cache": "int8"},  # 97 words are no multiple for quantized heads
    "int4_awq": {"group_size": 64},
}
SIZES: dict[str, dict[str, Any]] = {
    "int4_awq": WIDE, "int8_wo": WIDE, "int4_wo": WIDE, "w4a8_awq": WIDEST, "nvfp4": WIDEST | {"vocab_size": 512},
}  # fmt: skip
# Relative error of dequantized weights: about half a step of each code over the weights' spread.
ERROR = {"fp8": 0.04, "fp8_rowwise": 0.04, "int8_sq": 0.02, "int4_awq": 0.15, "w4a8_awq": 0.15, "nvfp4": 0.13}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_round_trip(family: str, weight_format: str, make_case: Callable[..., Any], tmp_path: Path) -> None:
    # tp 4 repeats the 2 key/value heads and pads 97 words to 100
    case = make_case(family, **SIZES.get(weight_format, {}))
    for tp in (1, 2, 4):
        out = case.write(tmp_path / f"tp{tp}", weight_format, tp=tp, **OPTIONS[weight_format])
        assert verify_trtllm(out, case.checkpoint) == []
        rebuilt = rebuild_hf(out)
        assert rebuilt.keys() == set(case.checkpoint.names)
        rounded = 0
        for name, tensor in rebuilt.items():
            source = case.checkpoint.read(name)
            if tensor.dtype == source.dtype:
                assert torch.equal(tensor, source), name
            else:
                rounded += 1
                assert 0 < (tensor - source.float()).norm() / source.float().norm() < ERROR[weight_format], name
        quantized_heads = 4 if OPTIONS[weight_format].get("quant_heads") else 0
        assert rounded == (
            7 * case.checkpoint.config.num_hidden_layers + quantized_heads if weight_format in ERROR else 0
        )


@pytest.mark.parametrize("layout", ["v2", "vllm"])
def test_every_head_has_its_own_lm_head(layout: str, make_case: Callable[..., Any], tmp_path: Path) -> None:
    case = make_case("llama", layout, num_layers=2, tie_word_embeddings=layout == "v2")
    tensors = load_file(case.write(tmp_path / "out") / "rank0.safetensors")
    for head in range(2):
        expected = case.checkpoint.read(f"medusa_heads.{head}.2.weight")
        assert torch.equal(tensors[f"medusa_heads.{head}.lm_head.weight"], expected)
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)
    assert verify_trtllm(tmp_path / "out", case.checkpoint) == []


def test_biases_of_llama(make_case: Callable[..., Any], tmp_path: Path) -> None:
    case = make_case("llama", attention_bias=True, mlp_bias=True)
    out = case.write(tmp_path / "out", "fp8", tp=2)
    ranks = [load_file(out / f"rank{rank}.safetensors") for rank in range(2)]
    read = case.checkpoint.read
    for name, source in (("attention.dense", "self_attn.o_proj"), ("mlp.proj", "mlp.down_proj")):
        for rank in ranks:  # added once, after the ranks' sum
            assert torch.equal(rank[f"transformer.layers.0.{name}.bias"], read(f"model.layers.0.{source}.bias"))
    gate = torch.cat([rank["transformer.layers.0.mlp.fc.bias"] for rank in ranks])
    assert torch.equal(gate, read("model.layers.0.mlp.gate_proj.bias"))
    qkv = ranks[1]["transformer.layers.0.attention.qkv.bias"]
    parts = [read(f"model.layers.0.self_attn.{x}_proj.bias").chunk(2)[1] for x in "qkv"]
    assert torch.equal(qkv, torch.cat(parts))
    assert verify_trtllm(out, case.checkpoint) == []


def test_same_inputs_give_the_same_bytes(make_case: Callable[..., Any], tmp_path: Path) -> None:
    case = make_case()
    first, second = (case.write(tmp_path / name, "fp8", tp=2, kv_cache="fp8") for name in ("a", "b"))
    for file in ("config.json", "rank0.safetensors", "rank1.safetensors"):
        assert (first / file).read_bytes() == (second / file).read_bytes()


@pytest.mark.parametrize(
    ("stored", "asked", "written"),
    [
        (torch.float32, "auto", "float16"),
        (torch.bfloat16, "auto", "bfloat16"),
        (torch.float16, "auto", "float16"),
        (torch.float32, "bfloat16", "bfloat16"),
    ],
)
def test_dtype(stored: torch.dtype, asked: str, written: str, make_case: Callable[..., Any], tmp_path: Path) -> None:
    case = make_case(dtype=stored)
    out = case.write(tmp_path / "out", dtype=asked)
    assert json.loads((out / "config.json").read_text())["dtype"] == written
    assert {tensor.dtype for tensor in load_file(out / "rank0.safetensors").values()} == {getattr(torch, written)}
    assert verify_trtllm(out, case.checkpoint) == []


def test_progress_counts_bytes(make_case: Callable[..., Any], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    case = make_case()
    out = case.write(tmp_path / "out", tp=2, progress=lambda done, total: seen.append((done, total)))
    for rank in range(2):
        sizes = [tensor.nbytes for tensor in load_file(out / f"rank{rank}.safetensors").values()]
        mine, seen = seen[: len(sizes)], seen[len(sizes) :]
        assert mine[-1] == (sum(sizes), sum(sizes))
        steps = [later - earlier for (earlier, _), (later, _) in zip([(0, 0), *mine], mine, strict=False)]
        assert sorted(steps) == sorted(sizes)
    assert not seen


def test_largest_tensor_bounds_what_is_read_at_once(
    make_case: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, rows = make_case(), []
    read_rows = type(case.checkpoint).read_rows

    def spy(self: Any, name: str, start: int, stop: int) -> torch.Tensor:
        rows.append((name, stop - start))
        return read_rows(self, name, start, stop)

    monkeypatch.setattr(type(case.checkpoint), "read_rows", spy)
    case.write(tmp_path / "out", tp=2)
    assert max(count for name, count in rows if name == "lm_head.weight") == -(-VOCAB // 2)
    assert all(count <= HIDDEN // 2 for name, count in rows if "medusa" in name and "linear" in name)


class TestRefusals:
    def test_fp8_without_scales(self, make_case: Callable[..., Any], tmp_path: Path) -> None:
        case = make_case()
        with pytest.raises(ConfigError, match="calibrate first"):
            write_trtllm(tmp_path / "out", case.checkpoint, get_format("fp8"), None, tree=TREE)
        assert not (tmp_path / "out").exists()

    def test_scales_without_heads(self, make_case: Callable[..., Any], tmp_path: Path) -> None:
        case = make_case()
        base = {name: amax for name, amax in case.scales.weight_amax.items() if "medusa" not in name}
        case.scales = Scales(base, base, case.scales.kv_amax)
        case.write(tmp_path / "base", "fp8")
        with pytest.raises(CheckpointError, match=r"medusa_heads.0.0.linear.*calibrate again"):
            case.write(tmp_path / "out", "fp8", quant_heads=True)

    def test_scales_of_another_model(self, make_case: Callable[..., Any], tmp_path: Path) -> None:
        case = make_case()
        amax = {name: value / 2 for name, value in case.scales.weight_amax.items()}
        case.scales = Scales(case.scales.input_amax, amax, case.scales.kv_amax)
        with pytest.raises(CheckpointError, match="calibrate with this very checkpoint"):
            case.write(tmp_path / "out", "fp8")

    def test_overflow(self, make_case: Callable[..., Any], tmp_path: Path) -> None:
        case = make_case(dtype=torch.bfloat16)
        case.edit(lambda tensors: tensors["model.norm.weight"][3:4].fill_(1e5))
        with pytest.raises(CheckpointError, match=r"transformer.ln_f.weight.*bfloat16"):
            case.write(tmp_path / "out", dtype="float16")
        case.write(tmp_path / "fine", dtype="bfloat16")

    def test_tree_deeper_than_heads(self, make_case: Callable[..., Any], tmp_path: Path) -> None:
        with pytest.raises(TreeError, match="depth 3"):
            make_case().write(tmp_path / "out", tree=Tree.from_choices([[0], [0, 0], [0, 0, 0]]))

    def test_empty_tree(self, make_case: Callable[..., Any], tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="empty tree"):
            make_case().write(tmp_path / "out", tree=Tree(()))

    def test_unwritable(self, make_case: Callable[..., Any], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="file"):
            make_case().write(tmp_path / "file" / "out")
