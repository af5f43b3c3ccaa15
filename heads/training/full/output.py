"""What a training leaves: heads alone beside their config, or base and heads in one Hugging Face directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from medusa_export.core.errors import ConfigError
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.checkpoint.medusa_checkpoint import load_reference
from medusa_export.heads.training.full.arguments import LAYOUTS, ReferenceArguments
from medusa_export.heads.training.full.modelopt_medusa import own_head_parameters, save_combined
from medusa_export.heads.training.head_module import write_heads, write_heads_config

# What a directory needs beside weights and config.json to be used; tokenizers differ in their files.
COMPANIONS = ("tokenizer*", "*.jinja", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
              "generation_config.json")  # fmt: skip


def write_output(model: Any, model_dir: Path, out: Path, arguments: ReferenceArguments) -> float:
    """Write what was trained, in the dtype that the base model is stored in.

    Layouts "v1" and "v2" are ``medusa_lm_head.safetensors`` in FasterDecoding's form: with a config.json of its own for a frozen
    base, beside the base's files for one that was trained. "modelopt" is one checkpoint of base and heads.

    Args:
        model: in ModelOpt's Medusa form, adapters merged.
        out: an existing directory.

    Returns:
        Frobenius norm of the base's change over that of the base, both as stored; 0 for a frozen base.

    Raises:
        ConfigError: a base that was to be trained and did not change.
    """
    dtype = getattr(torch, DecoderConfig.from_dir(model_dir).dtype)
    fresh = load_reference(model_dir, dtype)
    change = _copy_base(model, fresh)
    if arguments.trains_base and change == 0:
        raise ConfigError(
            "joint training", "a base model that did not change", "one that did", "train longer or with a higher rate"
        )
    if LAYOUTS[arguments.layout].holds_base:
        save_combined(model.to(dtype), out)
        _copy_companions(model_dir, out)
        return change
    tensors = {name: parameter.detach() for name, parameter in own_head_parameters(model).items()}
    write_heads(out, tensors, dtype)
    if arguments.trains_base:
        fresh.save_pretrained(out)
        shutil.copyfile(
            model_dir / "config.json", out / "config.json"
        )  # nothing in it changed: not even its version's form
        _copy_companions(model_dir, out)
    else:
        write_heads_config(out, arguments.heads, arguments.layers, shared=arguments.shares_lm_head)
    return change


def _copy_base(model: Any, fresh: Any) -> float:
    """Put the trained base into the model as it was, and measure the difference."""
    trained = dict(model.named_parameters())
    difference, norm = 0.0, 0.0
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            stored = trained[name].detach().to("cpu", parameter.dtype)
            difference += float((stored.double() - parameter.double()).square().sum())
            norm += float(parameter.double().square().sum())
            parameter.copy_(stored)
    return float((difference / norm) ** 0.5)


def _copy_companions(model_dir: Path, out: Path) -> None:
    for pattern in COMPANIONS:
        for path in sorted(model_dir.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, out / path.name)
