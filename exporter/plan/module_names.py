"""What TensorRT-LLM calls the modules of a Hugging Face decoder layer."""

from __future__ import annotations

from medusa_export.heads.checkpoint import families

# TensorRT-LLM applies the activation to ``fc`` and multiplies by ``gate``: the reverse of what the names suggest.
TRTLLM_LINEARS: dict[str, str] = {
    families.Q_PROJ: "attention.qkv",
    families.K_PROJ: "attention.qkv",
    families.V_PROJ: "attention.qkv",
    families.O_PROJ: "attention.dense",
    families.GATE_PROJ: "mlp.fc",
    families.UP_PROJ: "mlp.gate",
    families.DOWN_PROJ: "mlp.proj",
}

# One row a matrix that is stored: q, k and v are one, which goes by the name of q.
STORED_LINEARS: dict[str, str] = {
    pattern: name for pattern, name in TRTLLM_LINEARS.items() if pattern not in (families.K_PROJ, families.V_PROJ)
}


def trtllm_layer(layer: int) -> str:
    """The name of a decoder layer: ``transformer.layers.3``."""
    return f"transformer.layers.{layer}"


def trtllm_linear(pattern: str, layer: int) -> str:
    """The name of a linear, by its Hugging Face pattern: ``families.Q_PROJ`` of layer 3 is ``transformer.layers.3.attention.qkv``."""
    return f"{trtllm_layer(layer)}.{TRTLLM_LINEARS[pattern]}"
