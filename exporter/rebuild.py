"""A TensorRT-LLM Medusa checkpoint turned back into Hugging Face tensors, to compare with what it was made from.

Written from TensorRT-LLM's rules and config.json alone: no code is shared with the writer, so each checks the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medusa_export.heads.checkpoint import TensorSource
from medusa_export.heads.config import read_json
from medusa_export.heads.errors import CheckpointError


@dataclass(frozen=True)
class Rebuilt:
    """A tensor under its Hugging Face name: float32 where it was quantized, otherwise in the file's dtype.

    Attributes:
        scale: of a dequantized weight, None for others.
    """

    name: str
    tensor: torch.Tensor
    scale: float | None = None


def rebuild_hf(trt_dir: Path) -> dict[str, torch.Tensor]:
    """Every weight and bias of base and heads by Hugging Face name, dequantized, all in memory.

    Raises:
        CheckpointError: a missing tensor, ranks that disagree on a replicated one, or padding that is not zero.
    """
    return {item.name: item.tensor for item in iter_hf(trt_dir)}


def iter_hf(trt_dir: Path) -> Iterator[Rebuilt]:
    """As :func:`rebuild_hf`, one tensor at a time."""
    ranks = _Ranks(trt_dir)
    config = ranks.config
    yield Rebuilt("model.embed_tokens.weight", ranks.replicated("transformer.vocab_embedding.weight"))
    for layer in range(config["num_hidden_layers"]):
        yield from _layer(ranks, f"transformer.layers.{layer}.", f"model.layers.{layer}.")
    yield Rebuilt("model.norm.weight", ranks.replicated("transformer.ln_f.weight"))
    yield _vocabulary(ranks, "lm_head", "lm_head")
    for head in range(config["num_medusa_heads"]):
        for layer in range(config["num_medusa_layers"]):
            source = f"medusa_heads.{head}.medusa_layers.{layer}.linear"
            yield from _joined(ranks, source, f"medusa_heads.{head}.{layer}.linear", 0)
        yield _vocabulary(ranks, f"medusa_heads.{head}.lm_head", f"medusa_heads.{head}.{config['num_medusa_layers']}")


def activation_scales(trt_dir: Path) -> dict[str, float]:
    """Input scale of every quantized linear by Hugging Face module name."""
    ranks = _Ranks(trt_dir)
    scales = {}
    for name in ranks.files[0].names:
        module, _, kind = name.rpartition(".")
        if kind == "activation_scaling_factor":
            value = ranks.replicated(name).item()
            scales.update(dict.fromkeys(_hf_modules(module, ranks.config["num_medusa_layers"]), value))
    return scales


class _Ranks:
    """The rank files of one checkpoint, read side by side."""

    def __init__(self, trt_dir: Path) -> None:
        self.config: dict[str, Any] = read_json(trt_dir / "config.json")
        self.tp = self.config["mapping"]["tp_size"]
        self.files = [TensorSource.open(trt_dir / f"rank{rank}.safetensors") for rank in range(self.tp)]

    def has(self, name: str) -> bool:
        return name in self.files[0]

    def split(self, name: str) -> list[torch.Tensor]:
        """One tensor of every rank."""
        return [file.read(name) for file in self.files]

    def replicated(self, name: str) -> torch.Tensor:
        """A tensor that has to be the same on every rank."""
        first, *others = self.split(name)
        if not all(torch.equal(first, other) for other in others):
            raise CheckpointError(name, "ranks that differ", "the same tensor on every rank", "export again")
        return first

    def weights(self, module: str) -> tuple[list[torch.Tensor], float | None]:
        """A linear's weight of every rank, dequantized, and its scale."""
        parts = self.split(f"{module}.weight")
        if parts[0].dtype != torch.float8_e4m3fn:
            return parts, None
        scale = self.replicated(f"{module}.weights_scaling_factor").item()
        return [part.to(torch.float32) * scale for part in parts], scale


def _layer(ranks: _Ranks, source: str, target: str) -> Iterator[Rebuilt]:
    yield Rebuilt(f"{target}input_layernorm.weight", ranks.replicated(f"{source}input_layernorm.weight"))
    yield Rebuilt(f"{target}post_attention_layernorm.weight", ranks.replicated(f"{source}post_layernorm.weight"))
    for theirs, ours in (("q_layernorm", "q_norm"), ("k_layernorm", "k_norm")):
        if ranks.has(f"{source}attention.{theirs}.weight"):
            tensor = ranks.replicated(f"{source}attention.{theirs}.weight")
            yield Rebuilt(f"{target}self_attn.{ours}.weight", tensor)
    yield from _qkv(ranks, f"{source}attention.qkv", f"{target}self_attn")
    yield from _joined(ranks, f"{source}attention.dense", f"{target}self_attn.o_proj", 1)
    yield from _joined(ranks, f"{source}mlp.fc", f"{target}mlp.gate_proj", 0)
    yield from _joined(ranks, f"{source}mlp.gate", f"{target}mlp.up_proj", 0)
    yield from _joined(ranks, f"{source}mlp.proj", f"{target}mlp.down_proj", 1)


def _qkv(ranks: _Ranks, source: str, target: str) -> Iterator[Rebuilt]:
    """Undo the stacking of q, k and v on every rank; copies of a shared key/value head have to agree."""
    weights, scale = ranks.weights(source)
    yield from (Rebuilt(f"{target}.{name}.weight", tensor, scale) for name, tensor in _unstack(ranks, weights).items())
    if ranks.has(f"{source}.bias"):
        biases = _unstack(ranks, ranks.split(f"{source}.bias"))
        yield from (Rebuilt(f"{target}.{name}.bias", tensor) for name, tensor in biases.items())


def _unstack(ranks: _Ranks, parts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    config, tp = ranks.config, ranks.tp
    size, kv_heads = config["head_size"], config["num_key_value_heads"]
    q_rows, kv_rows = config["num_attention_heads"] // tp * size, max(kv_heads // tp, 1) * size
    queries, keys, values = zip(*(part.split([q_rows, kv_rows, kv_rows]) for part in parts), strict=True)
    copies = max(tp // kv_heads, 1)
    return {
        "q_proj": torch.cat(queries),
        "k_proj": torch.cat(_one_of_each(keys, copies)),
        "v_proj": torch.cat(_one_of_each(values, copies)),
    }


def _one_of_each(parts: tuple[torch.Tensor, ...], copies: int) -> list[torch.Tensor]:
    for index, part in enumerate(parts):
        if not torch.equal(part, parts[index - index % copies]):
            raise CheckpointError("attention.qkv", "ranks that differ in a shared head", "equal copies", "export again")
    return list(parts[::copies])


def _joined(ranks: _Ranks, source: str, target: str, axis: int) -> Iterator[Rebuilt]:
    """A linear split on its outputs (axis 0, bias too) or its inputs (axis 1, bias whole)."""
    weights, scale = ranks.weights(source)
    yield Rebuilt(f"{target}.weight", torch.cat(weights, dim=axis), scale)
    bias = f"{source}.bias"
    if ranks.has(bias):
        yield Rebuilt(f"{target}.bias", torch.cat(ranks.split(bias)) if axis == 0 else ranks.replicated(bias))


def _vocabulary(ranks: _Ranks, source: str, target: str) -> Rebuilt:
    weights, scale = ranks.weights(source)
    joined = torch.cat(weights)
    rows = ranks.config["vocab_size"]
    if joined[rows:].any():
        raise CheckpointError(f"{source}.weight", "padding rows that are not zero", "zeros at the end", "export again")
    return Rebuilt(f"{target}.weight", joined[:rows], scale)


_LINEARS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}


def _hf_modules(module: str, num_medusa_layers: int) -> list[str]:
    """``transformer.layers.0.mlp.fc`` -> ``model.layers.0.mlp.gate_proj`` and so on."""
    parts = module.split(".")
    if parts[0] == "medusa_heads":
        last = f"{parts[3]}.linear" if parts[2] == "medusa_layers" else str(num_medusa_layers)
        return [f"medusa_heads.{parts[1]}.{last}"]
    return [f"model.layers.{parts[2]}.{name}" for name in _LINEARS[".".join(parts[3:])]]
