"""The verifier finds what a wrong writer, a wrong config or a damaged disk would leave behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_export.core.artifacts.manifest import output_directory
from medusa_export.exporter.verify.checkpoint import verify_export, verify_trtllm

Tensors = dict[str, torch.Tensor]
L0 = "transformer.layers.0."


def edit(out: Path, change: Callable[[Tensors], None], rank: int = 0) -> None:
    path = out / f"rank{rank}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def edit_config(out: Path, **changes: Any) -> None:
    path = out / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def swap(one: str, other: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()

    return change


def scale(name: str, factor: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name] * factor

    return change


def swap_q_and_k(tensors: Tensors) -> None:
    name = f"{L0}attention.qkv.weight"  # one rank of two: 2 query heads, 1 key head, 1 value head of 16 rows
    weight = tensors[name].view(torch.uint8)
    q, k, v = weight.split([32, 16, 16])
    tensors[name] = torch.cat([k, q, v]).view(torch.float8_e4m3fn)


def swap_k_and_v(tensors: Tensors) -> None:
    name = f"{L0}attention.qkv.weight"
    q, k, v = tensors[name].view(torch.uint8).split([32, 16, 16])
    tensors[name] = torch.cat([q, v, k]).view(torch.float8_e4m3fn)


def flip_sign_of_one_byte(tensors: Tensors) -> None:
    tensors[f"{L0}mlp.proj.weight"].view(torch.uint8)[5, 7] ^= 0x80


def set_nan(tensors: Tensors) -> None:
    tensors["transformer.ln_f.weight"][3] = float("nan")


def fill_padding(tensors: Tensors) -> None:
    tensors["lm_head.weight"][-1, 0] = 1.0


def drop(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def surplus(tensors: Tensors) -> None:
    tensors["transformer.layers.0.attention.qkv.bias"] = torch.zeros(64, dtype=torch.float16)


FAULTS: dict[str, tuple[Callable[[Tensors], None], int, str]] = {
    "q and k swapped": (swap_q_and_k, 0, "q_proj.weight: .* values are not the source's"),
    "k and v swapped": (swap_k_and_v, 1, "k_proj.weight: .* values are not the source's"),
    "fc and gate swapped": (swap(f"{L0}mlp.fc.weight", f"{L0}mlp.gate.weight"), 0, "gate_proj.weight"),
    "heads swapped": (swap("medusa_heads.0.lm_head.weight", "medusa_heads.1.lm_head.weight"), 0, r"medusa_heads.0.1.w"),
    "flipped byte": (flip_sign_of_one_byte, 0, "down_proj.weight: 1 of 5120 values"),
    "not a number": (set_nan, 1, "ln_f.weight has values that are not finite"),
    "replicas differ": (
        scale("transformer.ln_f.weight", 2.0),
        1,
        "model.norm.weight: 64 values are not the source's on ranks",
    ),
    "scale of one rank": (
        scale(f"{L0}mlp.fc.weights_scaling_factor", 2.0),
        1,
        "mlp.fc.weights_scaling_factor: got ranks",
    ),
    "zero scale": (scale(f"{L0}mlp.fc.activation_scaling_factor", 0.0), 0, "a scale is above 0"),
    "padding": (fill_padding, 1, "lm_head.weight: got padding rows"),
    "no medusa lm_head": (drop("medusa_heads.1.lm_head.weight"), 0, "medusa_heads.1.lm_head.weight is missing"),
    "no medusa bias": (drop("medusa_heads.0.medusa_layers.0.linear.bias"), 0, "linear.bias is missing"),
    "no kv scale": (drop(f"{L0}attention.kv_cache_scaling_factor"), 1, "kv_cache_scaling_factor is missing"),
    "surplus": (surplus, 0, "attention.qkv.bias is not expected"),
}


@pytest.fixture
def exported(make_case: Callable[..., Any], tmp_path: Path) -> tuple[Path, Any]:
    case = make_case(tie_word_embeddings=False)
    out = case.write(tmp_path / "out", "fp8", tp=2, kv_cache="fp8", quant_heads=True)
    assert verify_trtllm(out, case.checkpoint) == []
    return out, case


@pytest.mark.parametrize("fault", FAULTS)
def test_seeded_fault(fault: str, exported: tuple[Path, Any]) -> None:
    out, case = exported
    change, rank, message = FAULTS[fault]
    edit(out, change, rank)
    problems = verify_trtllm(out, case.checkpoint)
    assert any(re.search(message, problem) for problem in problems), problems


def test_scale_twice_too_large_on_every_rank(exported: tuple[Path, Any]) -> None:
    out, case = exported
    for rank in range(2):
        edit(out, scale(f"{L0}attention.qkv.weights_scaling_factor", 2.0), rank)
    problems = verify_trtllm(out, case.checkpoint)
    assert [problem.split(":")[0] for problem in problems] == [
        f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_dtype": "fp8"}, "kv_dtype at top level"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"vocab_size": 98}, "vocab_size 98 in config.json, but the embedding has 97 rows"),
        ({"mapping": {"world_size": 4, "tp_size": 2, "pp_size": 2}}, "pp_size 1"),
        (
            {"mapping": {"world_size": 4, "tp_size": 4, "pp_size": 1}},
            "tp_size 4 in config.json, but the ranks are of 2",
        ),
        (
            {"mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1}},
            "tp_size 1 in config.json, but the ranks are of 2",
        ),
        ({"quantization": {"quant_algo": "FP8", "quantized_layers": {}}}, "quantized_layers is unknown"),
        ({"quantization": {"quant_algo": "FP8_ROWWISE"}}, "'FP8_ROWWISE' is not one of"),
        ({"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}, "medusa_heads.0.lm_head"),
        ({"rotary_base": 500000.0}, "rotary_base is 500000.0, the source has 10000.0"),
        ({"rotary_scaling": {"rope_type": "llama3"}}, "rotary_scaling has no type"),
        ({"norm_epsilon": 1e-5}, "norm_epsilon is 1e-05, the source has 1e-06"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, the source has False"),
        ({"qwen_type": "qwen2"}, "qwen_type is 'qwen2', the source has 'llama'"),
        ({"max_draft_len": 0}, "max_draft_len is below 1"),
        ({"num_medusa_heads": 3}, "num_medusa_heads 3 in config.json, but the ranks have 2"),
        ({"model_type": "qwen2"}, "no qwen_type"),
        ({"mapping": None}, "mapping is None"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
    ],
)
def test_wrong_config(changes: dict[str, Any], message: str, exported: tuple[Path, Any]) -> None:
    out, case = exported
    edit_config(out, **changes)
    problems = verify_trtllm(out, case.checkpoint)
    assert any(re.search(message, problem) for problem in problems), problems


def test_weight_only_needs_the_heads_excluded(make_case: Callable[..., Any], tmp_path: Path) -> None:
    out = make_case(intermediate_size=128).write(tmp_path / "out", "int8_wo")
    quantization = json.loads((out / "config.json").read_text())["quantization"]
    quantization["exclude_modules"].remove("*medusa_heads*")
    edit_config(out, quantization=quantization)
    missing = "medusa_heads.0.medusa_layers.0.linear.per_channel_scale is missing; exclude medusa_heads.0.medusa_layers.0.linear*"
    assert any(missing in problem for problem in verify_trtllm(out))


def test_damaged_files_are_problems_not_tracebacks(exported: tuple[Path, Any]) -> None:
    out, _ = exported
    path = out / "rank1.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert any("rank1.safetensors" in problem for problem in verify_trtllm(out))
    (out / "config.json").write_text("{")
    assert any("unreadable JSON" in problem for problem in verify_trtllm(out))


def test_export_directory(make_case: Callable[..., Any], tmp_path: Path) -> None:
    case, out = make_case(), tmp_path / "export"
    with output_directory(out, inputs={}, arguments={}) as work:
        case.write(work.path / "trtllm")
    assert verify_export(out) == []
    rank = out / "trtllm" / "rank0.safetensors"
    data = bytearray(rank.read_bytes())
    data[-1] ^= 1  # the smallest change there is, which no comparison of weights would be sure to see
    rank.write_bytes(bytes(data))
    assert any("rank0.safetensors" in problem for problem in verify_export(out))


def test_a_checkpoint_without_a_manifest(exported: tuple[Path, Any]) -> None:
    """As another tool leaves it; its scales are checked too."""
    out, _ = exported
    assert verify_export(out) == []
    edit(out, scale(f"{L0}mlp.fc.activation_scaling_factor", 0.0))
    assert len(verify_export(out)) == 1
    assert len(verify_export(out / "nothing")) == 1
