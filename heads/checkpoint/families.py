"""Model families as data: what differs between Llama, Mistral, Qwen2 and Qwen3, in one frozen row each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """How one family's Hugging Face checkpoint is laid out and what its blocks contain.

    Attributes:
        model_type: ``model_type`` in config.json.
        architecture: the causal-LM class name that config.json must carry.
        trtllm_model_type: what TensorRT-LLM's MedusaConfig expects; "qwen" in it selects the Qwen base.
        qkv_bias: whether q, k and v carry biases when config.json does not say (Qwen2: always).
        qk_norm: per-head RMSNorm on q and k before the rotary embedding (Qwen3).
        default_rope_theta: rotary base when config.json has none.
    """

    model_type: str
    architecture: str
    trtllm_model_type: str
    qkv_bias: bool = False
    qk_norm: bool = False
    default_rope_theta: float = 10000.0


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", "llama"),
        Family("mistral", "MistralForCausalLM", "llama"),
        Family("qwen2", "Qwen2ForCausalLM", "qwen2", qkv_bias=True),
        Family("qwen3", "Qwen3ForCausalLM", "qwen3", qk_norm=True),
    )
}

# Hugging Face names, the same in all four families. ``{}`` is the layer index.
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
