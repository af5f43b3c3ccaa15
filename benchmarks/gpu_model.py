"""Models for benchmarks/gpu.py: largest inputs of a real one's linears, and random ones of real sizes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint, load_reference
from medusa_export.quantize.scales import Scales

HEADS = 4
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "tie_word_embeddings": False,
    },
}  # fmt: skip
COMMON = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 8192, "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def largest_inputs(ckpt: Path, batches: Sequence[list[int]], place: str, dtype: torch.dtype) -> dict[str, float]:
    """Largest magnitude of every decoder linear's input, by module: what FP8 calibration without smoothing looks at."""
    model: Any = load_reference(ckpt, dtype, place)
    found: dict[str, torch.Tensor] = {}

    def look(name: str, module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        largest = inputs[0].detach().abs().max().float()
        found[name] = torch.maximum(found[name], largest) if name in found else largest

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(partial(look, name))
    with torch.inference_mode():
        for ids in batches:
            model(input_ids=torch.tensor([ids], device=place), use_cache=False)
    return {name: float(value) for name, value in found.items()}


def weight_maxima(checkpoint: MedusaCheckpoint) -> dict[str, float]:
    """Largest magnitude of every decoder linear's weight, by module."""
    names = [name for name in checkpoint.names if name.endswith("_proj.weight")]
    return {name.removesuffix(".weight"): float(checkpoint.read(name).abs().max()) for name in names}


def made_up_scales(checkpoint: MedusaCheckpoint) -> Scales:
    """For a random model, whose inputs nobody looks at."""
    weights = weight_maxima(checkpoint)
    return Scales(dict.fromkeys(weights, 8.0), weights)


def random_model(directory: Path, name: str) -> MedusaCheckpoint:
    """A checkpoint of a real model's sizes and random numbers, in bfloat16, with heads that share its projection."""
    directory.mkdir()
    model, heads, config = directory / "model", directory / "heads", COMMON | SHAPES[name]
    for path in (model, heads):
        path.mkdir()
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = DecoderConfig.from_dict(config).tensor_shapes()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 20, generator=generator).mul_(0.02).bfloat16()  # one block of numbers, again and again

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        size = torch.Size(shape).numel()
        return noise.repeat(-(-size // len(noise)))[:size].reshape(shape).contiguous()

    save_file({key: tensor(shape) for key, shape in shapes.items()}, model / "model.safetensors", {"format": "pt"})
    hidden = int(SHAPES[name]["hidden_size"])
    blocks = {f"{head}.0.linear.weight": tensor((hidden, hidden)) for head in range(HEADS)}
    blocks |= {f"{head}.0.linear.bias": tensor((hidden,)) for head in range(HEADS)}
    save_file(blocks, heads / "medusa_lm_head.safetensors")
    layout = {"medusa_num_heads": HEADS, "medusa_num_layers": 1, "version": "2"}
    (heads / "config.json").write_text(json.dumps(layout), encoding="utf-8")
    return MedusaCheckpoint.open(model, heads)
