"""Medusa heads as a torch module: what is trained, and how it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional

from medusa_export.heads.checkpoint.head_layouts import BLOCK_BIAS, BLOCK_WEIGHT, HEAD_FILES, HEAD_LM_HEAD
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint


class MedusaHeads(nn.Module):
    """Residual blocks ``x + silu(W x + b)``, and a vocabulary projection of each head where they do not share the base's.

    Head ``h`` reads the final-norm hidden state of position ``t`` and predicts token ``t + 2 + h``. New heads are the identity, so
    that they start as the base model's own next-token prediction (arXiv 2401.10774, 2.1.1).

    Args:
        num_heads, num_layers: heads, and residual blocks of each.
        lm_head: the base model's projection [vocab_size, hidden_size]; it is not trained.
        own_lm_head: every head trains a copy of it ("version 1"); otherwise all share it frozen ("version 2").
    """

    def __init__(self, num_heads: int, num_layers: int, lm_head: torch.Tensor, *, own_lm_head: bool = False) -> None:
        super().__init__()
        hidden = lm_head.shape[1]
        self.num_heads, self.num_layers = num_heads, num_layers
        self.weight = nn.Parameter(torch.zeros(num_heads, num_layers, hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(num_heads, num_layers, hidden))
        self.lm_head: torch.Tensor
        self.register_buffer("lm_head", lm_head.float(), persistent=False)
        self.own_lm_head = nn.Parameter(lm_head.float().repeat(num_heads, 1, 1)) if own_lm_head else None

    def forward(self, hidden: torch.Tensor, head: int) -> torch.Tensor:
        """The blocks of one head, before its projection.  # [..., hidden_size] -> [..., hidden_size]"""
        x = hidden
        for layer in range(self.num_layers):
            x = x + functional.silu(functional.linear(x, self.weight[head, layer], self.bias[head, layer]))
        return x

    def projection(self, head: int) -> torch.Tensor:
        """The vocabulary projection of one head.  # [vocab_size, hidden_size]"""
        return self.lm_head if self.own_lm_head is None else self.own_lm_head[head]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Canonical name (see ``head_formats``) -> float32 tensor; a shared projection is left out."""
        found = {}
        for head in range(self.num_heads):
            for layer in range(self.num_layers):
                found[BLOCK_WEIGHT.format(head, layer)] = self.weight[head, layer].detach()
                found[BLOCK_BIAS.format(head, layer)] = self.bias[head, layer].detach()
            if self.own_lm_head is not None:
                found[HEAD_LM_HEAD.format(head, self.num_layers)] = self.own_lm_head[head].detach()
        return found

    def load(self, checkpoint: MedusaCheckpoint) -> None:
        """Start from stored heads of the same shape; heads that are not stored stay the identity."""
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                if int(name.split(".")[1]) < checkpoint.num_medusa_heads:
                    tensor.copy_(checkpoint.read(name).float())

    def average(self, other: MedusaHeads, share: float) -> None:
        """Move every weight towards another module's. Fine-tuned heads and those that they come from are often better together than
        either is (WiSE-FT, arXiv 2109.01903).

        Args:
            other: of the same shape.
            share: of the other one, 0 .. 1.
        """
        with torch.no_grad():
            for mine, its in zip(self.parameters(), other.parameters(), strict=True):
                mine.lerp_(its.to(mine), share)

    def save(self, out: Path, dtype: torch.dtype) -> None:
        """Write ``medusa_lm_head.safetensors`` and config.json in FasterDecoding's layout, version 1 or 2.

        Args:
            out: an existing directory.
            dtype: of the stored tensors.
        """
        write_heads(out, self.tensors(), dtype)
        write_heads_config(out, self.num_heads, self.num_layers, shared=self.own_lm_head is None)


def write_heads(out: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """``medusa_lm_head.safetensors`` in FasterDecoding's names; tensors by canonical name.

    Args:
        out: an existing directory.
        tensors: by canonical name, ``medusa_heads.{head}.{layer}...``.
        dtype: what they are stored in.
    """
    stored = {name.removeprefix("medusa_heads."): tensor.detach().to("cpu", dtype) for name, tensor in tensors.items()}
    data = save({name: tensor.contiguous() for name, tensor in stored.items()}, {"format": "pt"})
    (out / HEAD_FILES[0]).write_bytes(data)  # save_file would make it readable for its owner only


def write_heads_config(out: Path, num_heads: int, num_layers: int, *, shared: bool) -> None:
    """config.json of heads alone; ``shared``: they use the base's lm_head ("version 2").

    Args:
        out: an existing directory.
        num_heads, num_layers: heads, and residual blocks of each.
        shared: heads use the base's lm_head.
    """
    config = {"medusa_num_heads": num_heads, "medusa_num_layers": num_layers} | ({"version": "2"} if shared else {})
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
