"""The plan and config.json: names, shapes and rules, without a weight in sight."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from medusa_export.exporter.plan import Kind, Slice, TensorPlan, plan_ranks, scaled_layers, scaled_modules
from medusa_export.exporter.spec import ExportSpec
from medusa_export.exporter.trtllm_config import trtllm_config
from medusa_export.exporter.verify import required_tensors
from medusa_export.heads.config import DecoderConfig
from medusa_export.heads.errors import ConfigError
from medusa_export.quantize.formats import FORMATS, KV_CACHE

GOLDEN = Path(__file__).parents[2] / "golden" / "trtllm_llama_fp8.json"
BASE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "torch_dtype": "bfloat16",
}


def make_spec(model_type: str = "llama", *, tp: int = 1, fmt: str = "none", **options: Any) -> ExportSpec:
    kv_cache, quant_heads = options.pop("kv_cache", "none"), options.pop("quant_heads", False)
    numbers = {"heads": 2, "layers": 1, "max_draft_len": 7, "dtype": "bfloat16"}
    numbers |= {key: options.pop(key) for key in list(options) if key in numbers}
    config = DecoderConfig.from_dict({"model_type": model_type, **BASE, **options})
    return ExportSpec(
        config,
        numbers["heads"],
        numbers["layers"],
        numbers["max_draft_len"],
        tp,
        FORMATS[fmt],
        numbers["dtype"],
        KV_CACHE[kv_cache],
        quant_heads,
    )


def tensor(spec: ExportSpec, name: str, rank: int = 0) -> TensorPlan:
    return {plan.name: plan for plan in plan_ranks(spec)[rank].tensors}[name]


def rows(plan: TensorPlan) -> list[tuple[str, int, int]]:
    return [(source.tensor.split(".")[-2], source.start, source.stop) for source in plan.sources]


def test_golden_listing() -> None:
    # MEDUSA_EXPORT_GOLDEN=write rewrites the file; read the difference before keeping it
    got = {
        f"tp{tp}": [
            {plan.name: f"{plan.dtype} {list(plan.shape)}" for plan in rank.tensors}
            for rank in plan_ranks(make_spec(tp=tp, fmt="fp8", kv_cache="fp8", quant_heads=True))
        ]
        for tp in (1, 2)
    }
    if os.environ.get("MEDUSA_EXPORT_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps(got, indent=1) + "\n")
    assert got == json.loads(GOLDEN.read_text())


def combinations() -> Iterator[tuple[str, int, str, str, bool]]:
    for family, tp, fmt, kv in product(
        ("llama", "mistral", "qwen2", "qwen3"), (1, 2, 4), ("none", "fp8"), ("none", "fp8")
    ):
        for quant_heads in (False, True) if fmt == "fp8" else (False,):
            yield family, tp, fmt, kv, quant_heads


@pytest.mark.parametrize(("family", "tp", "fmt", "kv", "quant_heads"), combinations())
def test_agrees_with_the_specification(family: str, tp: int, fmt: str, kv: str, quant_heads: bool) -> None:
    """``required_tensors`` derives the same list from config.json, from the other side."""
    spec = make_spec(family, tp=tp, fmt=fmt, kv_cache=kv, quant_heads=quant_heads, layers=2)
    need = required_tensors(trtllm_config(spec))
    for rank in plan_ranks(spec):
        assert {plan.name: (plan.dtype, plan.shape) for plan in rank.tensors} == need


class TestQkv:
    def test_q_k_and_v_are_cut_separately(self) -> None:
        plan = tensor(make_spec(tp=2), "transformer.layers.1.attention.qkv.weight", rank=1)
        assert rows(plan) == [("q_proj", 32, 64), ("k_proj", 16, 32), ("v_proj", 16, 32)]
        assert plan.shape == (64, 64)

    def test_shared_key_value_heads_are_repeated(self) -> None:
        spec = make_spec(tp=4)
        names = [rows(tensor(spec, "transformer.layers.0.attention.qkv.weight", rank))[1] for rank in range(4)]
        assert names == [("k_proj", 0, 16), ("k_proj", 0, 16), ("k_proj", 16, 32), ("k_proj", 16, 32)]

    def test_bias_follows_the_weight(self) -> None:
        plan = tensor(make_spec("qwen2", tp=2), "transformer.layers.0.attention.qkv.bias", rank=1)
        assert rows(plan) == [("q_proj", 32, 64), ("k_proj", 16, 32), ("v_proj", 16, 32)]
        assert plan.shape == (64,)

    def test_one_scale_for_all_three(self) -> None:
        plan = tensor(make_spec(fmt="fp8"), "transformer.layers.0.attention.qkv.weights_scaling_factor")
        assert plan.kind is Kind.WEIGHT_SCALE
        assert plan.modules == tuple(f"model.layers.0.self_attn.{x}_proj" for x in "qkv")


def test_fc_is_gate_proj_and_gate_is_up_proj() -> None:
    spec = make_spec()
    assert tensor(spec, "transformer.layers.0.mlp.fc.weight").sources[0].tensor == "model.layers.0.mlp.gate_proj.weight"
    assert tensor(spec, "transformer.layers.0.mlp.gate.weight").sources[0].tensor == "model.layers.0.mlp.up_proj.weight"


def test_vocabulary_is_padded_with_rows_at_the_end() -> None:
    spec = make_spec(tp=4)
    last = tensor(spec, "lm_head.weight", rank=3)
    assert (last.shape, last.sources) == ((25, 64), (Slice("lm_head.weight", 0, 75, 97),))
    assert tensor(spec, "medusa_heads.1.lm_head.weight", rank=3).shape == (25, 64)
    assert tensor(spec, "transformer.vocab_embedding.weight", rank=3).shape == (97, 64)
    assert trtllm_config(spec)["vocab_size"] == 97


def test_a_rank_can_hold_padding_only() -> None:
    spec = make_spec(tp=4, vocab_size=5)
    assert [len(tensor(spec, "lm_head.weight", rank).sources) for rank in range(4)] == [1, 1, 1, 0]


def test_what_calibration_has_to_give() -> None:
    spec = make_spec(fmt="fp8", kv_cache="fp8", quant_heads=True)
    modules = scaled_modules(spec)
    assert len(modules) == len(set(modules)) == 2 * 7 + 2 * 2
    assert scaled_layers(spec) == [0, 1]
    assert scaled_modules(make_spec()) == []
    assert scaled_layers(make_spec()) == []


class TestConfig:
    def test_quantized_heads_are_not_excluded(self) -> None:
        quantization = trtllm_config(make_spec(fmt="fp8", quant_heads=True))["quantization"]
        assert "lm_head*" in quantization["exclude_modules"]  # "*lm_head" would also match the heads'
        assert "*medusa_heads*" not in quantization["exclude_modules"]

    @pytest.mark.parametrize("fmt", ["fp8", "int8_wo"])
    def test_16_bit_heads_are_excluded(self, fmt: str) -> None:
        excluded = trtllm_config(make_spec(fmt=fmt))["quantization"]["exclude_modules"]
        assert {"*lm_head", "*vocab_embedding", "*medusa_heads*"} <= set(excluded)

    def test_16_bit_base(self) -> None:
        assert trtllm_config(make_spec())["quantization"] == {"quant_algo": None, "kv_cache_quant_algo": None}

    def test_llama3_rope_keeps_every_number(self) -> None:
        scaling = {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }  # fmt: skip
        config = trtllm_config(make_spec(rope_scaling=scaling, rope_theta=500000.0))
        assert config["rotary_scaling"] == {**scaling, "type": "llama3"}
        assert config["rotary_base"] == 500000.0

    def test_rope_type_under_its_old_name(self) -> None:
        config = trtllm_config(make_spec(rope_scaling={"type": "linear", "factor": 2.0}))
        assert config["rotary_scaling"]["type"] == "linear"

    def test_qwen_keys_are_explicit(self) -> None:
        qwen2, qwen3 = trtllm_config(make_spec("qwen2")), trtllm_config(make_spec("qwen3"))
        assert (qwen2["qwen_type"], qwen2["attn_bias"], qwen2["qk_layernorm"]) == ("qwen2", True, False)
        assert (qwen3["qwen_type"], qwen3["attn_bias"], qwen3["qk_layernorm"]) == ("qwen3", False, True)
        assert qwen2["use_logn_attn"] is False
        assert "qwen_type" not in trtllm_config(make_spec("mistral"))

    def test_top_level_is_free_of_names_that_raise(self) -> None:
        assert not {"kv_dtype", "quant_mode", "quant_algo"} & trtllm_config(make_spec(kv_cache="fp8")).keys()

    def test_true_counts(self) -> None:
        config = trtllm_config(make_spec(tp=4, max_draft_len=11, head_dim=32))
        assert (config["num_key_value_heads"], config["head_size"], config["max_draft_len"]) == (2, 32, 11)
        assert config["mapping"] == {"world_size": 4, "tp_size": 4, "pp_size": 1}


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"tp": 3}, "attention.qkv: got 4 query heads over tp 3; .* use tp 1, 2, 4$"),
            ({"tp": 2, "intermediate_size": 81}, "mlp.fc: got 81 intermediate features .* use tp 1$"),
            (
                {"tp": 2, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16, "intermediate_size": 192},
                "3 key/value heads over tp 2; .* use tp 1$",
            ),
            ({"tp": 0}, "tp: got 0; expected at least 1"),
            ({"fmt": "int8_wo", "intermediate_size": 96}, "mlp.fc in format int8_wo.*no tp works.*another format"),
            ({"fmt": "int8_wo", "tp": 2}, r"attention.qkv in format int8_wo.*\[128, 64\].*multiples of 128.*use tp 1$"),
            ({"fmt": "int8_wo", "quant_heads": True}, "leave the heads in 16 bit"),
            ({"quant_heads": True}, "format none"),
            ({"dtype": "float32"}, "float16 or bfloat16"),
            ({"max_draft_len": 0}, "empty tree"),
            ({"heads": 0}, "at least 1 of each"),
            ({"model_type": "qwen3", "attention_bias": True}, "a bias on o_proj"),
        ],
    )
    def test_what_tensorrt_llm_cannot_build(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            make_spec(**options)
