"""Model families as data: what differs between Llama, Mistral, Qwen2 and Qwen3, in one frozen row each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrtllmModel:
    """What TensorRT-LLM builds a family as.

    Attributes:
        model_type: ``model_type`` of the checkpoint's config.json, of a Medusa engine and of a plain one.
        architecture: of a plain engine.
        is_qwen: whether MedusaForCausalLm takes its Qwen model as the base, which it does where "qwen" is in ``model_type``. That one
            reads keys of its own and has no bias on o_proj.
    """

    model_type: str
    architecture: str
    is_qwen: bool = False


@dataclass(frozen=True)
class Family:
    """How one family's Hugging Face checkpoint is laid out and what its blocks contain.

    Attributes:
        model_type: ``model_type`` in config.json.
        architecture: the causal-LM class name that config.json must carry.
        trtllm: what TensorRT-LLM builds it as.
        qkv_bias: whether q, k and v carry biases when config.json does not say (Qwen2: always).
        qk_norm: per-head RMSNorm on q and k before the rotary embedding (Qwen3).
        default_rope_theta: rotary base when config.json has none.
        default_window: sliding window when config.json has none; None where transformers' model has no windows at all.
        switches_window: whether ``use_sliding_window`` has to ask for it, and then for some layers only.
    """

    model_type: str
    architecture: str
    trtllm: TrtllmModel
    qkv_bias: bool = False
    qk_norm: bool = False
    default_rope_theta: float = 10000.0
    default_window: int | None = None
    switches_window: bool = False


LLAMA = TrtllmModel("llama", "LlamaForCausalLM")
QWEN2 = TrtllmModel("qwen2", "Qwen2ForCausalLM", is_qwen=True)
QWEN3 = TrtllmModel("qwen3", "Qwen3ForCausalLM", is_qwen=True)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", LLAMA),
        Family("mistral", "MistralForCausalLM", LLAMA, default_window=4096),
        Family("qwen2", "Qwen2ForCausalLM", QWEN2, qkv_bias=True, default_window=4096, switches_window=True),
        Family("qwen3", "Qwen3ForCausalLM", QWEN3, qk_norm=True, default_window=4096, switches_window=True),
    )
}


def plain_architecture(trtllm_model_type: str) -> str:
    """The architecture of a plain TensorRT-LLM engine; Llama for what is in no row, as MedusaForCausalLm does."""
    models = {family.trtllm.model_type: family.trtllm for family in FAMILIES.values()}
    return models.get(trtllm_model_type, LLAMA).architecture


# Hugging Face names, the same in all families. ``{}`` is the layer index.
EMBED_TOKENS = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"
INPUT_LAYERNORM = "model.layers.{}.input_layernorm.weight"
POST_ATTENTION_LAYERNORM = "model.layers.{}.post_attention_layernorm.weight"
Q_NORM = "model.layers.{}.self_attn.q_norm.weight"
K_NORM = "model.layers.{}.self_attn.k_norm.weight"
Q_PROJ = "model.layers.{}.self_attn.q_proj"
K_PROJ = "model.layers.{}.self_attn.k_proj"
V_PROJ = "model.layers.{}.self_attn.v_proj"
O_PROJ = "model.layers.{}.self_attn.o_proj"
GATE_PROJ = "model.layers.{}.mlp.gate_proj"
UP_PROJ = "model.layers.{}.mlp.up_proj"
DOWN_PROJ = "model.layers.{}.mlp.down_proj"
