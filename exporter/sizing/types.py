"""What is asked of a sizing, and what it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from medusa_export.exporter.plan.spec import ExportSpec
from medusa_export.exporter.sizing.gpus import Fit, RankMemory
from medusa_export.exporter.sizing.speed import Speed

FLOAT32, FLOAT16 = 4, 2  # bytes
ENGINE_CODE, BUILD_COPIES = 30_000_000, 4  # of TensorRT-RTX 1.7: docs/tensorrt.md
UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


@dataclass(frozen=True)
class Request:
    """What besides the layout decides sizes.

    Attributes:
        calibrates: scales have to be measured here.
        onnx_form: the ONNX form of an ONNX Runtime engine; None where none is written.
        max_length: context of the ONNX Runtime engine, in tokens.
        draft_vocab: tokens that its drafts are drawn from; 0 is all.
        stored_bytes: of one weight in the checkpoint.
        shared_lm_head: all heads use the base's lm_head.
        tokenizer_bytes: of the tokenizer's files, which are copied.
        reserve: bytes that the export wants to see free before it starts.
        batch, context: sequences, and tokens of each, on the GPU.
        portable: the ONNX form of a TensorRT engine; None where none is written.
        of_checkpoint: whether TensorRT-LLM engines are built of the checkpoint.
    """

    calibrates: bool
    onnx_form: str | None
    max_length: int
    draft_vocab: int
    stored_bytes: int
    shared_lm_head: bool
    tokenizer_bytes: int
    reserve: int
    batch: int
    context: int
    portable: str | None = None
    of_checkpoint: bool = False


@dataclass(frozen=True)
class ExportMachine:
    """Where the export runs: bytes free on the output's disk, bytes of RAM available, and whether a GPU calibrates."""

    disk_free: int
    ram_available: int
    has_gpu: bool


@dataclass(frozen=True)
class Group:
    """Tensors of one kind in a rank file: how many, how stored, their bytes, and what there is to know about them."""

    name: str
    count: int
    stored: str
    bytes: int
    note: str


@dataclass(frozen=True)
class Item:
    """One part of the disk or of the RAM that is needed: bytes, and where the number comes from."""

    what: str
    bytes: int
    how: str


@dataclass(frozen=True)
class Sizing:
    """What an export will take, in bytes.

    Attributes:
        layout: what is written, by name.
        parameters, head_parameters: weights stored for the base and for all heads.
        tensors: those of rank 0.
        rank_bytes: exact size of every rank file.
        disk: the parts of the output; ``disk_needed`` is their sum.
        disk_reserve: what the export wants to see free before it starts; an upper bound.
        ram: stages of the export, one at a time; the largest and the libraries make ``ram_needed``.
        memory: of one rank's GPU, for the layout's batch and context.
        speeds: tokens a second on GPUs, estimated; empty where none was asked for.
    """

    layout: dict[str, Any]
    parameters: int
    head_parameters: int
    tensors: tuple[Group, ...]
    rank_bytes: tuple[int, ...]
    disk: tuple[Item, ...]
    disk_needed: int
    disk_reserve: int
    disk_free: int
    ram: tuple[Item, ...]
    ram_needed: int
    ram_available: int
    memory: RankMemory
    gpus: tuple[Fit, ...]
    speeds: tuple[Speed, ...] = ()


def parameter_count(spec: ExportSpec) -> int:
    return sum(map(math.prod, spec.config.tensor_shapes().values()))


def head_parameter_count(spec: ExportSpec, shared_lm_head: bool) -> int:
    hidden, vocab = spec.config.hidden_size, spec.config.vocab_size
    lm_head = 0 if shared_lm_head else vocab * hidden
    return spec.num_medusa_heads * (spec.num_medusa_layers * hidden * (hidden + 1) + lm_head)


def readable(number: int) -> str:
    """Bytes in decimal units, three to four digits."""
    unit, name = next(((unit, name) for unit, name in UNITS if number >= unit), (1, "B"))
    return f"{number / unit:.{2 if number < 100 * unit else 1}f} {name}" if unit > 1 else f"{number} B"
