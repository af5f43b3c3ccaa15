"""The command lines of ``trtllm-build`` for a Medusa checkpoint, and the plain checkpoint that its baseline is built from.

Sources: TensorRT-LLM's commands/build.py and examples/medusa/README.md; every flag here is taken by all releases from 0.17 to 1.2.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_export.core.errors import ConfigError
from medusa_export.heads.checkpoint.families import plain_architecture

TOOL = "trtllm-build"
MEDUSA, BASELINE = "medusa", "baseline"  # the two engines of an engine directory
AWQ_ALGOS = ("W4A16_AWQ", "W4A8_AWQ")
MEDUSA_KEYS = ("num_medusa_heads", "num_medusa_layers", "max_draft_len")
# By kv_cache_quant_algo: the paged context attention has no INT8 kernels.
PAGED_CONTEXT_FMHA: dict[str | None, str] = {None: "enable", "FP8": "enable", "INT8": "disable"}


@dataclass(frozen=True)
class BuildSize:
    """What an engine is built for.

    Attributes:
        max_batch_size: sequences at once. TensorRT-LLM's default of 2048 would ask for 131,072 tokens a step with 63 drafts.
        max_seq_len: tokens of prompt and answer together.
    """

    max_batch_size: int
    max_seq_len: int

    def __post_init__(self) -> None:
        for name, least in (("max_batch_size", 1), ("max_seq_len", 2)):
            if getattr(self, name) < least:
                raise ConfigError(name, str(getattr(self, name)), f"{least} or more", "correct it")


def build_command(
    config: Mapping[str, Any], size: BuildSize, *, checkpoint: str | Path, output: str | Path, medusa: bool = True
) -> list[str]:
    """``trtllm-build`` with its arguments.

    ``--max_draft_len`` is left to the checkpoint: another number would size the engine for one tree and build it for another.

    Args:
        config: the Medusa checkpoint's config.json.
        checkpoint: directory to read.
        output: directory to write.
        medusa: build for Medusa; otherwise a plain engine of the same weights, from :func:`plain_config`.
    """
    nodes = config["max_draft_len"] + 1 if medusa else 1  # tokens that a sequence puts into a step
    dtype, cache = config["dtype"], config["quantization"].get("kv_cache_quant_algo")
    flags: dict[str, str | int | Path] = {
        "checkpoint_dir": checkpoint,
        "output_dir": output,
        **({"speculative_decoding_mode": "medusa"} if medusa else {}),
        "max_batch_size": size.max_batch_size,
        "max_beam_width": 1,
        "max_input_len": size.max_seq_len - 1,
        "max_seq_len": size.max_seq_len,
        "max_num_tokens": max(size.max_seq_len, size.max_batch_size * nodes),
        "opt_num_tokens": size.max_batch_size * nodes,
        "kv_cache_type": "paged",
        "remove_input_padding": "enable",
        "gpt_attention_plugin": dtype,
        "gemm_plugin": dtype,
        "use_paged_context_fmha": PAGED_CONTEXT_FMHA[cache],
        "workers": config["mapping"]["tp_size"],
        "log_level": "info",
    }
    return [TOOL, *(text for name, value in flags.items() for text in (f"--{name}", str(value)))]


def needs_awq_mending(config: Mapping[str, Any]) -> bool:
    """Whether the Medusa build fails without :mod:`~medusa_export.engines.trtllm.awq_builder`."""
    return config["quantization"].get("quant_algo") in AWQ_ALGOS


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same weights without Medusa: the rank files' heads are then surplus, which TensorRT-LLM warns of and drops.

    An engine that was built for Medusa pays for the whole tree in every step, whatever it is told at run time, so what a speed-up is
    measured against has to be another one.
    """
    plain = {key: value for key, value in config.items() if key not in MEDUSA_KEYS}
    return plain | {"architecture": plain_architecture(config["model_type"])}
