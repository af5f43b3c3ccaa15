"""The plan of the unified Hugging Face checkpoint: names, shapes and shared scales, without a weight in sight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.plan.hf_layout import excluded_modules, plan_hf, require_hf
from medusa_export.exporter.plan.spec import ExportSpec
from medusa_export.exporter.plan.tensor_plan import Slice, TensorPlan
from medusa_export.quantize.stored_parts import Kind
from tests.unit.exporter.plan.test_trtllm_layout import make_spec

HIDDEN, INNER, KV, VOCAB = 64, 128, 32, 97
WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "head_dim": 128,
}  # what every format's kernels take


@dataclass(frozen=True)
class Names:
    """What the plan reads of a checkpoint: a layer, what is around it, and one head."""

    extra: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        layer = {
            "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }  # fmt: skip
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
        found |= {f"model.layers.1.{name}.weight": shape for name, shape in layer.items()}
        found |= {"model.layers.1.input_layernorm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
        found |= {"medusa_heads.0.0.linear.weight": (HIDDEN, HIDDEN), "medusa_heads.0.1.weight": (VOCAB, HIDDEN)}
        return found | dict.fromkeys(self.extra, (HIDDEN,))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]


def plan(spec: ExportSpec, *extra: str) -> dict[str, TensorPlan]:
    return {tensor.name: tensor for tensor in plan_hf(Names(extra), spec)}  # type: ignore[arg-type]


def shapes(found: dict[str, TensorPlan], module: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    prefix = f"model.layers.1.{module}."
    own = {name.removeprefix(prefix): each for name, each in found.items() if name.startswith(prefix)}
    return {name: (each.dtype, each.shape) for name, each in own.items()}


def test_without_quantization_everything_is_copied() -> None:
    found, names = plan(make_spec()), Names().shapes
    assert {name: each.shape for name, each in found.items()} == names
    assert list(found) == list(names), "in the order of the source"
    for name, each in found.items():
        assert (each.kind, each.dtype, each.sources) == (Kind.COPY, "bfloat16", (Slice(name),))


def test_a_tied_lm_head_is_left_out() -> None:
    assert "lm_head.weight" not in plan(make_spec(tie_word_embeddings=True))


@pytest.mark.parametrize(
    ("weight_format", "stored"),
    [
        ("fp8", {"weight": ("float8_e4m3fn", (INNER, HIDDEN)), "weight_scale": ("float32", ()), "input_scale": ("float32", ())}),
        ("fp8_rowwise", {"weight": ("float8_e4m3fn", (INNER, HIDDEN)), "weight_scale": ("float32", (INNER,))}),
        ("nvfp4", {"weight": ("uint8", (INNER, HIDDEN // 2)), "weight_scale": ("float8_e4m3fn", (INNER, HIDDEN // 16)),
                   "weight_scale_2": ("float32", ()), "input_scale": ("float32", ())}),
    ],
)  # fmt: skip
def test_what_a_linear_is_stored_in(weight_format: str, stored: dict[str, Any]) -> None:
    found = plan(make_spec(weight_format=weight_format, **WIDE))
    assert shapes(found, "mlp.up_proj") == stored
    assert shapes(found, "input_layernorm") == {"weight": ("bfloat16", (HIDDEN,))}
    kept = ("model.embed_tokens.weight", "lm_head.weight", "medusa_heads.0.0.linear.weight", "medusa_heads.0.1.weight")
    assert all(found[name].kind is Kind.COPY for name in kept)


def test_heads_are_quantized_on_demand() -> None:
    found = plan(make_spec(weight_format="fp8", quant_heads=True), "medusa_heads.0.0.linear.bias")
    assert {name for name in found if name.startswith("medusa_heads")} == {
        *(f"medusa_heads.0.0.linear.{suffix}" for suffix in ("weight", "weight_scale", "input_scale", "bias")),
        *(f"medusa_heads.0.1.{suffix}" for suffix in ("weight", "weight_scale", "input_scale")),
    }
    assert found["medusa_heads.0.0.linear.bias"].kind is Kind.COPY
    assert excluded_modules(make_spec(quant_heads=True, weight_format="fp8")) == ["lm_head", "model.embed_tokens"]
    assert excluded_modules(make_spec())[-1] == "medusa_heads*"


def modules(found: dict[str, TensorPlan], tensor: str) -> list[str]:
    return [module.removeprefix("model.layers.1.") for module in found[f"model.layers.1.{tensor}"].modules]


def test_linears_that_read_the_same_input_share_its_scale() -> None:
    """Loaders fuse them; FP4 kernels want one weight scale of them too."""
    together = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    fp8, nvfp4 = plan(make_spec(weight_format="fp8")), plan(make_spec(weight_format="nvfp4", **WIDE))
    for found in (fp8, nvfp4):
        assert modules(found, "self_attn.k_proj.input_scale") == together
        assert modules(found, "mlp.gate_proj.input_scale") == ["mlp.gate_proj", "mlp.up_proj"]
        assert modules(found, "mlp.down_proj.input_scale") == ["mlp.down_proj"]
    assert (
        modules(fp8, "self_attn.k_proj.weight_scale") == modules(fp8, "self_attn.k_proj.weight") == ["self_attn.k_proj"]
    )
    assert modules(nvfp4, "self_attn.k_proj.weight_scale_2") == together


def test_a_quantized_cache_has_a_scale_for_keys_and_one_for_values() -> None:
    found = plan(make_spec(weight_format="fp8", kv_cache="fp8"), "model.layers.1.self_attn.k_proj.bias")
    scales = {name: each for name, each in found.items() if each.kind is Kind.KV_SCALE}
    attention = "model.layers.1.self_attn"
    assert list(scales) == [f"{attention}.k_proj.k_scale", f"{attention}.v_proj.v_scale"]
    assert all((each.layer, each.dtype, each.shape) == (1, "float32", ()) for each in scales.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp": 2}, "--format hf with --tp: got an option of TensorRT-LLM's form; expected none"),
        ({"weight_format": "fp8", "exclude": ("*mlp.proj*",)}, "--format hf with --exclude: "),
        ({"kv_cache": "int8"}, "--format hf with --kv-cache int8: "),
        ({"weight_format": "int8_wo"}, "--format hf with --quant int8_wo: got no writer for it; expected none, fp8, .* or nvfp4;"),
    ],
)  # fmt: skip
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        require_hf(make_spec(**options, **WIDE))


def test_taken() -> None:
    require_hf(make_spec(weight_format="fp8", kv_cache="fp8", quant_heads=True))
