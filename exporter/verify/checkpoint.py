"""Checks a written export against the specification, its manifest and, where given, the model that it came from.

What every file has to hold is what TensorRT-LLM's loader asks for, see ``trtllm_loader/check.py``, which knows nothing of the writer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from medusa_export.core.artifacts.manifest import MANIFEST, verify_manifest
from medusa_export.core.errors import CheckpointError, ConfigError
from medusa_export.exporter.verify.causes import config_causes
from medusa_export.exporter.verify.comparison import Comparison, weight_problems
from medusa_export.exporter.verify.trtllm_loader.check import open_ranks, rank_problems
from medusa_export.exporter.verify.trtllm_loader.config import config_problems, read_config
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.checkpoint.tensor_source import TensorSource, row_chunks

POSITIVE = ("_scaling_factor", "_scaling_factor_2", "per_channel_scale")


def verify_export(out: Path) -> list[str]:
    """Problems of an export directory: its manifest's hashes, then the checkpoint in ``out/trtllm`` if there is one.

    A TensorRT-LLM Medusa checkpoint that something else wrote has no manifest; of it, all but hashes is checked.
    """
    if not (out / MANIFEST).is_file() and (out / "config.json").is_file():
        return verify_trtllm(out)
    problems = list(verify_manifest(out))
    return problems + (verify_trtllm(out / "trtllm") if (out / "trtllm").is_dir() else [])


def verify_trtllm(
    trt_dir: Path, checkpoint: MedusaCheckpoint | None = None, compared: Comparison | None = None
) -> list[str]:
    """Problems of a TensorRT-LLM Medusa checkpoint, one line each; an empty list is a good checkpoint.

    Args:
        trt_dir: the directory with config.json and the rank files.
        checkpoint: the model and heads that it was made from; every weight is compared with theirs.
        compared: that comparison, where it was made while the ranks were written.
    """
    try:
        config = read_config(trt_dir)
        problems = config_problems(config) or file_problems(trt_dir, config, values=checkpoint is None)
        if not problems and checkpoint is not None:
            problems = weight_problems(trt_dir, checkpoint, compared)
    except (CheckpointError, ConfigError) as error:
        return [str(error)]
    return problems


def file_problems(trt_dir: Path, config: dict[str, Any], *, values: bool) -> list[str]:
    """Ranks and what is in them.

    Args:
        values: look at the values of matrices too; a comparison with the source does it better.
    """
    files = open_ranks(trt_dir, config)
    problems = config_causes(config, [source for source in files.values() if not isinstance(source, str)])
    for name, source in files.items() if not problems else ():
        if isinstance(source, str):
            problems.append(f"{name}: {source}")
            continue
        found = [*rank_problems(source, config), *_value_problems(source, matrices=values)]
        problems += [f"{name}: {problem}" for problem in found]
    return problems


def _value_problems(source: TensorSource, *, matrices: bool) -> Iterator[str]:
    for name in source.names:
        is_scale = name.endswith(POSITIVE)
        if not matrices and not is_scale and len(source.shape(name)) > 1:
            continue
        tensor = source.read(name)
        if tensor.is_floating_point() and not all(_finite(part) for part in row_chunks(tensor)):
            yield f"{name} has values that are not finite"
        elif is_scale and not bool((tensor.to(torch.float32) > 0).all()):
            yield f"{name} has the value {float(tensor.to(torch.float32).min())}; a scale is above 0"


def _finite(part: torch.Tensor) -> bool:
    """Whether all values are finite: the smallest and the largest tell, and NaN comes through both."""
    if part.dtype == torch.float8_e4m3fn:
        return int((part.view(torch.uint8) & 0x7F).max()) < 0x7F  # its only NaN, and it has no infinity
    low, high = part.aminmax()
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))
