"""config.json of a TensorRT-LLM Medusa checkpoint.

Every key is written even where TensorRT-LLM has a default: some defaults are wrong for these models (``hidden_act``,
``position_embedding_type``), others depend on the release (the Qwen keys before 1.2).
"""

from __future__ import annotations

from typing import Any

from medusa_export.exporter.plan.spec import ExportSpec
from medusa_export.exporter.plan.trtllm_rope import rotary_scaling


def trtllm_config(spec: ExportSpec) -> dict[str, Any]:
    """The file's content. Never ``kv_dtype``, ``quant_mode`` or ``quant_algo`` at top level: TensorRT-LLM raises."""
    config = spec.config
    body: dict[str, Any] = {
        "architecture": "MedusaForCausalLM",
        "model_type": config.family.trtllm.model_type,
        "dtype": spec.dtype,
        "logits_dtype": "float32",
        "vocab_size": config.vocab_size,  # never the padded one
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,  # never the duplicated count
        "head_size": config.head_dim,
        "hidden_act": config.hidden_act,
        "norm_epsilon": config.rms_norm_eps,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": config.max_position_embeddings,
        "rotary_base": config.rope_theta,
        "rotary_scaling": rotary_scaling(config),
        "attn_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "qk_layernorm": config.family.qk_norm,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": spec.tp, "tp_size": spec.tp, "pp_size": 1},
        "quantization": _quantization(spec),
        "num_medusa_heads": spec.num_medusa_heads,
        "num_medusa_layers": spec.num_medusa_layers,
        "max_draft_len": spec.max_draft_len,
    }
    return {**body, **_qwen_keys(spec)} if spec.qwen_base else body


def _quantization(spec: ExportSpec) -> dict[str, Any]:
    body: dict[str, Any] = {
        "quant_algo": spec.weight_format.trtllm.algo,
        "kv_cache_quant_algo": spec.kv_cache.quant_algo,
    }
    if spec.weight_format.is_quantized:
        body["exclude_modules"] = spec.exclude_modules
    if spec.weight_format.group_size is not None:
        body["group_size"] = spec.weight_format.group_size
    return body | dict(spec.weight_format.trtllm.config)


def _qwen_keys(spec: ExportSpec) -> dict[str, Any]:
    """Read by the Qwen layers; releases before 1.2 build a Llama config for Medusa, which lacks them."""
    return {
        "qwen_type": spec.config.family.trtllm.model_type,
        "seq_length": spec.config.max_position_embeddings,
        "use_logn_attn": False,
        "moe_intermediate_size": 0,
        "moe_shared_expert_intermediate_size": 0,
    }
