"""The plan and config.json: names, shapes and rules, without a weight in sight."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.plan.spec import ExportSpec
from medusa_export.exporter.plan.tensor_plan import Kind, Slice, TensorPlan
from medusa_export.exporter.plan.trtllm_config import trtllm_config
from medusa_export.exporter.plan.trtllm_layout import needed_scales, plan_rank, plan_ranks
from medusa_export.exporter.verify.trtllm_loader.modules import required_tensors
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.quantize.formats import FORMATS, KV_CACHE, get_format
from tests.paths import assert_golden

BASE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "torch_dtype": "bfloat16",
}


def make_spec(model_type: str = "llama", *, tp: int = 1, weight_format: str = "none", **options: Any) -> ExportSpec:
    kv_cache, quant_heads = options.pop("kv_cache", "none"), options.pop("quant_heads", False)
    group_size, exclude = options.pop("group_size", None), options.pop("exclude", ())
    numbers = {"heads": 2, "layers": 1, "max_draft_len": 7, "dtype": "bfloat16"}
    numbers |= {key: options.pop(key) for key in list(options) if key in numbers}
    config = DecoderConfig.from_dict({"model_type": model_type, **BASE, **options})
    return ExportSpec(
        config,
        numbers["heads"],
        numbers["layers"],
        numbers["max_draft_len"],
        tp,
        get_format(weight_format, group_size),
        numbers["dtype"],
        KV_CACHE[kv_cache],
        quant_heads,
        exclude,
    )


def tensor(spec: ExportSpec, name: str, rank: int = 0) -> TensorPlan:
    return {plan.name: plan for plan in plan_ranks(spec)[rank].tensors}[name]


def rows(plan: TensorPlan) -> list[tuple[str, int, int]]:
    return [(source.tensor.split(".")[-2], source.start, source.stop) for source in plan.sources]


def test_golden_listing() -> None:
    got = {
        f"tp{tp}": [
            {plan.name: f"{plan.dtype} {list(plan.shape)}" for plan in rank.tensors}
            for rank in plan_ranks(make_spec(tp=tp, weight_format="fp8", kv_cache="fp8", quant_heads=True))
        ]
        for tp in (1, 2)
    }
    assert_golden("trtllm_llama_fp8.json", got)


@st.composite
def specs(draw: st.DrawFn) -> ExportSpec:
    """Layouts that can be built, of every family, format, size and number of ranks."""
    tp, weight_format = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from(list(FORMATS.values())))
    kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
    tile = 128 * tp if weight_format.trtllm.multiple > 1 or weight_format.trtllm.rank_tile != (1, 1) else tp
    head_dim = draw(st.sampled_from([64, 128]))
    return make_spec(
        draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"])),
        tp=tp,
        weight_format=weight_format.name,
        kv_cache=draw(st.sampled_from(list(KV_CACHE))),
        quant_heads=weight_format.quantizes_heads and draw(st.booleans()),
        group_size=draw(st.sampled_from(weight_format.group_sizes or (None,))),
        hidden_size=tile * draw(st.integers(1, 4)),
        intermediate_size=tile * draw(st.integers(1, 5)),
        num_attention_heads=8 * max(tp, kv_heads) // draw(st.sampled_from([1, 2, 4])),
        num_key_value_heads=kv_heads,
        head_dim=head_dim if weight_format.trtllm.multiple == 1 and weight_format.trtllm.rank_tile == (1, 1) else 128,
        vocab_size=tile * draw(st.integers(1, 3)) - (0 if tile > 8 else draw(st.integers(0, 7)) % tile),
        num_hidden_layers=draw(st.integers(1, 3)),
        heads=draw(st.integers(1, 5)),
        layers=draw(st.integers(1, 2)),
        tie_word_embeddings=draw(st.booleans()),
    )


@settings(max_examples=150, deadline=None)
@given(specs())
def test_agrees_with_the_specification(spec: ExportSpec) -> None:
    """``required_tensors`` derives the same list from config.json, from the other side."""
    need = required_tensors(json.loads(json.dumps(trtllm_config(spec))))
    for rank in plan_ranks(spec):
        assert {plan.name: (plan.dtype, plan.shape) for plan in rank.tensors} == need


@settings(max_examples=100, deadline=None)
@given(specs())
def test_ranks_hold_every_row_and_column_once(spec: ExportSpec) -> None:
    """Over all ranks every element of every weight is there as often as it is meant to be."""
    shapes = spec.config.tensor_shapes()
    copies = max(spec.tp // spec.config.num_key_value_heads, 1)
    elements: Counter[str] = Counter()
    weights = {Kind.COPY, Kind.FP8, Kind.FP8_ROW, Kind.INT8_ROW, Kind.INT4, Kind.FP4}
    for rank in plan_ranks(spec):
        for plan in (plan for plan in rank.tensors if plan.kind in weights):
            for source in plan.sources:
                shape = shapes.get(source.tensor)
                if shape is None:  # the heads' and lm_head
                    continue
                rows = (shape[0] if source.stop is None else source.stop) - source.start
                width = math.prod(shape[1:]) if plan.columns is None else plan.columns[1] - plan.columns[0]
                elements[source.tensor] += rows * width
    for name, shape in shapes.items():
        if name == "lm_head.weight":
            continue
        times = copies if ".k_proj" in name or ".v_proj" in name else 1
        whole = (
            "norm" in name or "embed" in name or (name.endswith(".bias") and ("o_proj" in name or "down_proj" in name))
        )
        assert elements[name] == math.prod(shape) * (spec.tp if whole else times), name


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
        plan = tensor(make_spec(weight_format="fp8"), "transformer.layers.0.attention.qkv.weights_scaling_factor")
        assert plan.kind is Kind.WEIGHT_SCALE
        assert plan.modules == tuple(f"model.layers.0.self_attn.{x}_proj" for x in "qkv")


def test_fc_is_gate_proj_and_gate_is_up_proj() -> None:
    spec = make_spec()
    assert tensor(spec, "transformer.layers.0.mlp.fc.weight").sources[0].tensor == "model.layers.0.mlp.gate_proj.weight"
    assert tensor(spec, "transformer.layers.0.mlp.gate.weight").sources[0].tensor == "model.layers.0.mlp.up_proj.weight"


def test_vocabulary_is_padded_with_rows_at_the_end() -> None:
    spec = make_spec(tp=4)
    last = tensor(spec, "lm_head.weight", rank=3)
    assert (last.shape, last.sources) == ((25, 64), (Slice("lm_head.weight", 75, 97),))
    assert tensor(spec, "medusa_heads.1.lm_head.weight", rank=3).shape == (25, 64)
    assert tensor(spec, "transformer.vocab_embedding.weight", rank=3).shape == (97, 64)
    assert trtllm_config(spec)["vocab_size"] == 97


def test_a_rank_can_hold_padding_only() -> None:
    spec = make_spec(tp=4, vocab_size=5)
    assert [len(tensor(spec, "lm_head.weight", rank).sources) for rank in range(4)] == [1, 1, 1, 0]


def test_what_calibration_has_to_give() -> None:
    spec = make_spec(weight_format="fp8", kv_cache="fp8", quant_heads=True)
    needed = needed_scales(spec)
    assert needed.keys() == {"input_amax", "weight_amax", "kv_amax"}
    assert len(needed["input_amax"]) == len(set(needed["input_amax"])) == 2 * 7 + 2 * 2
    assert (needed["weight_amax"], needed["kv_amax"]) == (needed["input_amax"], [0, 1])
    assert needed_scales(make_spec()) == {}
    wide = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    assert needed_scales(make_spec(weight_format="int4_awq", **wide)).keys() == {"pre_quant_scale"}
    assert needed_scales(make_spec(weight_format="int8_sq", kv_cache="int8")).keys() == {
        "pre_quant_scale",
        "input_amax",
        "kv_amax",
    }


class TestExclude:
    def test_is_added_to_what_always_stays(self) -> None:
        spec = make_spec(weight_format="fp8", exclude=("transformer.layers.0.*", "*mlp.proj"))
        written = trtllm_config(spec)["quantization"]["exclude_modules"]
        assert written == [*trtllm_config(make_spec(weight_format="fp8"))["quantization"]["exclude_modules"],
                           "transformer.layers.0.*", "*mlp.proj*"]  # fmt: skip
        kinds = {plan.name.removesuffix(".weight"): plan.kind for plan in plan_rank(spec, 0).tensors}
        assert kinds["transformer.layers.0.attention.qkv"] is kinds["transformer.layers.1.mlp.proj"] is Kind.COPY
        assert kinds["transformer.layers.1.attention.qkv"] is kinds["transformer.layers.1.mlp.fc"] is Kind.FP8

    def test_excluded_linears_need_not_fit(self) -> None:
        misfit = {"weight_format": "int8_wo", "hidden_size": 256, "head_dim": 64, "intermediate_size": 80}
        with pytest.raises(ConfigError, match=r"mlp.fc"):
            make_spec(**misfit)
        make_spec(**misfit, exclude=("*mlp*",))

    @pytest.mark.parametrize(
        ("weight_format", "pattern", "message"),
        [
            ("fp8", "model.layers.0.*", "no such module.*TensorRT-LLM's names"),
            ("fp8", "*mlp.fc", "only mlp.fc of layer 0.*both or none"),
            ("fp8_rowwise", "*mlp*", "use fp8"),
            ("none", "*mlp*", "format none"),
        ],
    )
    def test_refused(self, weight_format: str, pattern: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            make_spec(weight_format=weight_format, exclude=(pattern,))


class TestConfig:
    def test_quantized_heads_are_not_excluded(self) -> None:
        quantization = trtllm_config(make_spec(weight_format="fp8", quant_heads=True))["quantization"]
        assert "lm_head*" in quantization["exclude_modules"]  # "*lm_head" would also match the heads'
        assert "*medusa_heads*" not in quantization["exclude_modules"]

    @pytest.mark.parametrize("weight_format", ["fp8", "int8_wo"])
    def test_16_bit_heads_are_excluded(self, weight_format: str) -> None:
        excluded = trtllm_config(make_spec(weight_format=weight_format))["quantization"]["exclude_modules"]
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
            (
                {"weight_format": "int8_wo", "intermediate_size": 96},
                "mlp.fc in format int8_wo.*no tp works.*use --quant fp8$",
            ),
            (
                {"weight_format": "int8_wo", "tp": 2},
                r"attention.qkv in format int8_wo.*\[128, 64\].*multiples of .128, 128.*use tp 1$",
            ),
            (
                {
                    "weight_format": "int4_awq",
                    "hidden_size": 576,
                    "intermediate_size": 1536,
                    "num_attention_heads": 9,
                    "num_key_value_heads": 3,
                    "head_dim": 64,
                },
                r"int4_awq.*use --group-size 64$",
            ),
            (
                {"weight_format": "nvfp4", "tp": 2, "hidden_size": 128},
                r"attention.dense in format nvfp4|mlp.fc in format nvfp4",
            ),
            ({"weight_format": "int8_wo", "quant_heads": True}, "leave the heads in 16 bit"),
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


def test_linears_and_what_ranks_split_of_them() -> None:
    """qkv as fused over all ranks: with fewer key/value heads than ranks, each rank holds one of its own."""
    spec = make_spec("llama", tp=4, num_hidden_layers=1, vocab_size=97, heads=1, layers=2)
    assert spec.linear_shapes() == {
        "transformer.layers.0.attention.qkv": ((64 + 2 * 4 * 16, 64), 0),
        "transformer.layers.0.attention.dense": ((64, 64), 1),
        "transformer.layers.0.mlp.fc": ((128, 64), 0),
        "transformer.layers.0.mlp.gate": ((128, 64), 0),
        "transformer.layers.0.mlp.proj": ((64, 128), 1),
        "medusa_heads.0.medusa_layers.0.linear": ((64, 64), 0),
        "medusa_heads.0.medusa_layers.1.linear": ((64, 64), 0),
        "medusa_heads.0.lm_head": ((100, 64), 0),
    }
