"""Medusa heads written in any layout, whichever one they were read from; see ``heads/checkpoint/head_layouts.py`` for what each is.

Sources: FasterDecoding/Medusa's ``medusa_model.py``, vLLM's ``models/medusa.py``, and ModelOpt's ``speculative`` plugins.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from medusa_export.core.errors import CheckpointError, ConfigError, OutputError
from medusa_export.core.regular_files import found_instead
from medusa_export.core.text.tokenizer import TOKENIZER_FILES
from medusa_export.exporter.write.safetensors import DTYPE_NAMES, SafetensorsWriter
from medusa_export.exporter.write.shards import SHARD_BYTES, shards, write_index
from medusa_export.heads.checkpoint import families
from medusa_export.heads.checkpoint.head_layouts import BLOCK_BIAS, BLOCK_WEIGHT, HEAD_FILES, HEAD_LM_HEAD, holds_heads
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.checkpoint.tensor_source import CHUNK_VALUES

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class _Entry:
    """One tensor to write; see ``safetensors_writer.Entry``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor] = field(compare=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(getattr(torch, self.dtype).itemsize)


@dataclass(frozen=True)
class HeadLayout:
    """What a layout's files look like; the patterns take head and layer.

    Attributes:
        lm_head: None where the base model's is used.
        config: config.json, from the checkpoint and the names of the stored tensors.
        needs_bias: its readers expect biases, so that absent ones are written as zeros.
        lm_head_once: one lm_head for all heads is stored once.
        with_base: the base model, its config and its tokenizer lie in the same directory.
    """

    file: str
    weight: str
    bias: str
    lm_head: str | None
    config: Callable[[MedusaCheckpoint, set[str]], dict[str, Any]]
    needs_bias: bool = True
    lm_head_once: bool = False
    with_base: bool = False


def write_heads(out: Path, checkpoint: MedusaCheckpoint, layout: str, *, max_shard_bytes: int = SHARD_BYTES) -> None:
    """Write a checkpoint's Medusa heads, with the stored dtypes and bytes, as one of :data:`LAYOUTS`.

    The base model is written too where the layout has it inside ("modelopt"). One tensor is in memory at a time. What cannot be
    expressed is refused before the first byte is written. Heads that share an lm_head get a copy each where the layout has no way
    to say so, and "vllm" stores equal lm_heads once.

    Args:
        out: the directory to fill; a new or an empty one.
        layout: "medusa-v1", "medusa-v2", "vllm" or "modelopt".
        max_shard_bytes: "modelopt" is split into files of at most this size, but for tensors that are larger.

    Raises:
        ConfigError: an unknown layout.
        CheckpointError: lm_heads of the heads' own for "medusa-v2", which has none; a dtype that is not written.
        OutputError: files in ``out``, or a disk that cannot be written.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout {layout!r}", "an unknown name", f"one of {', '.join(LAYOUTS)}", "pick one of these")
    head_layout = LAYOUTS[layout]
    if head_layout.lm_head is None:
        _require_base_lm_head(checkpoint)
    entries = [*(_base_entries(checkpoint) if head_layout.with_base else ()), *_head_entries(checkpoint, head_layout)]
    _require_writable(checkpoint, entries)
    with _reported(out):
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):  # it may be where the heads are being read from
            raise OutputError(str(out), "files in it", "a new or an empty directory", "choose another one")
        _write_weights(out / head_layout.file, entries, max_shard_bytes if head_layout.with_base else None)
        config = head_layout.config(checkpoint, {entry.name for entry in entries})
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if head_layout.with_base:
            _copy_tokenizer(checkpoint.base.files[0].parent, out)


def _head_entries(checkpoint: MedusaCheckpoint, head_layout: HeadLayout) -> Iterator[_Entry]:
    layers = checkpoint.num_medusa_layers
    lm_heads = range(checkpoint.num_medusa_heads if head_layout.lm_head else 0)
    if head_layout.lm_head_once and _have_one_lm_head(checkpoint):
        lm_heads = lm_heads[:1]
    for head in range(checkpoint.num_medusa_heads):
        for layer in range(layers):
            yield _entry(checkpoint, head_layout.weight.format(head, layer), BLOCK_WEIGHT.format(head, layer))
            bias = BLOCK_BIAS.format(head, layer)
            if head_layout.needs_bias or bias in checkpoint.heads.names:
                yield _entry(checkpoint, head_layout.bias.format(head, layer), bias)
        if head_layout.lm_head and head in lm_heads:
            yield _entry(checkpoint, head_layout.lm_head.format(head, layers), HEAD_LM_HEAD.format(head, layers))


def _entry(checkpoint: MedusaCheckpoint, name: str, canonical: str) -> _Entry:
    return _Entry(name, checkpoint.dtype(canonical), checkpoint.shape(canonical), partial(checkpoint.read, canonical))


def _base_entries(checkpoint: MedusaCheckpoint) -> Iterator[_Entry]:
    """The base model as it is stored, so that what is tied stays tied; heads that it already has give way."""
    base = checkpoint.base
    for name in base.names:
        if not holds_heads([name]):
            yield _Entry(name, base.dtype(name), base.shape(name), partial(base.read, name))


def _require_writable(checkpoint: MedusaCheckpoint, entries: Sequence[_Entry]) -> None:
    known = [str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES]
    for entry in entries:
        if entry.dtype not in known:
            where = f"{checkpoint.heads.source.path}: {entry.name}"
            raise CheckpointError(where, f"dtype {entry.dtype}", f"one of {', '.join(known)}", "cast it first")


def _have_one_lm_head(checkpoint: MedusaCheckpoint) -> bool:
    """Whether all heads have the same lm_head, by reference or bit by bit. A single head's own one is its own."""
    first, *others = (HEAD_LM_HEAD.format(head, checkpoint.num_medusa_layers) for head in _heads(checkpoint))
    if checkpoint.heads_share_lm_head:
        return True
    stored = checkpoint.heads.names
    return bool(others) and all(
        stored[other] == stored[first] or _first_difference(checkpoint, first, other) is None for other in others
    )


def _require_base_lm_head(checkpoint: MedusaCheckpoint) -> None:
    stored = checkpoint.heads.names
    for head in _heads(checkpoint):
        name = HEAD_LM_HEAD.format(head, checkpoint.num_medusa_layers)
        row = _first_difference(checkpoint, name, families.LM_HEAD) if name in stored else None
        if row is not None:
            raise CheckpointError(
                f"{checkpoint.heads.source.path}: {stored[name]}",
                f"an lm_head of head {head}'s own, which differs from row {row} on",
                "the base model's, the only one that medusa-v2 has",
                "write medusa-v1 instead",
            )


def _heads(checkpoint: MedusaCheckpoint) -> range:
    return range(checkpoint.num_medusa_heads)


def _first_difference(checkpoint: MedusaCheckpoint, one: str, other: str) -> int | None:
    """The first row in which two matrices of one shape do not have the same bits; 0 where their dtypes differ."""
    if checkpoint.dtype(one) != checkpoint.dtype(other):
        return 0
    rows, width = checkpoint.shape(one)
    step = max(1, CHUNK_VALUES // width)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        pair = [checkpoint.read_rows(name, start, stop).contiguous().view(torch.uint8) for name in (one, other)]
        if not torch.equal(*pair):
            return start + int((pair[0] != pair[1]).any(dim=1).int().argmax())
    return None


def _write_weights(file: Path, entries: Sequence[_Entry], limit: int | None) -> None:
    """One file, or shards of at most ``limit`` bytes with their index."""
    files = shards(entries, limit, file.name)
    for name, group in files.items():
        _write_file(file.with_name(name), group)
    write_index(file.parent, files)


def _write_file(file: Path, entries: Sequence[_Entry]) -> None:
    with SafetensorsWriter(file, entries, {"format": "pt"}) as writer:  # transformers refuses a file without a format
        for entry in writer.entries:
            writer.write(entry.read())


def _copy_tokenizer(source: Path, out: Path) -> None:
    for name in TOKENIZER_FILES:
        if found_instead(source / name) is None:
            shutil.copyfile(source / name, out / name)


@contextmanager
def _reported(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            str(out), str(error), "a writable directory", "free some space or pick another path"
        ) from error


def _fasterdecoding_config(checkpoint: MedusaCheckpoint, names: set[str]) -> dict[str, Any]:
    config = checkpoint.config
    return {
        "base_model_name_or_path": config.raw.get("_name_or_path") or str(checkpoint.base.files[0].parent),
        "medusa_num_heads": checkpoint.num_medusa_heads,
        "medusa_num_layers": checkpoint.num_medusa_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
    }


def _v2_config(checkpoint: MedusaCheckpoint, names: set[str]) -> dict[str, Any]:
    return {**_fasterdecoding_config(checkpoint, names), "version": "2"}


def _vllm_config(checkpoint: MedusaCheckpoint, names: set[str]) -> dict[str, Any]:
    config, heads = checkpoint.config, checkpoint.num_medusa_heads
    has_all = f"lm_heads.{heads - 1}.weight" in names and not checkpoint.heads_share_lm_head
    return {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "truncated_vocab_size": config.vocab_size,
        "num_heads": heads,
        "num_hidden_layers": checkpoint.num_medusa_layers,
        "medusa_fc_bias": any(name.endswith(".bias") for name in names),
        "original_lm_head": not has_all,
        "torch_dtype": checkpoint.dtype(BLOCK_WEIGHT.format(0, 0)),
    }


def _combined_config(checkpoint: MedusaCheckpoint, names: set[str]) -> dict[str, Any]:
    counts = {"num_medusa_heads": checkpoint.num_medusa_heads, "num_medusa_layers": checkpoint.num_medusa_layers}
    return {**checkpoint.config.raw, "medusa": counts}


_BARE = ("{}.{}.linear.weight", "{}.{}.linear.bias", "{}.{}.weight")

LAYOUTS: dict[str, HeadLayout] = {
    "medusa-v1": HeadLayout(HEAD_FILES[0], *_BARE, _fasterdecoding_config),
    "medusa-v2": HeadLayout(HEAD_FILES[0], *_BARE[:2], None, _v2_config),
    "vllm": HeadLayout(
        WEIGHTS, "blocks.{}.layers.{}.weight", "blocks.{}.layers.{}.bias", "lm_heads.{}.weight", _vllm_config,
        needs_bias=False, lm_head_once=True,
    ),
    "modelopt": HeadLayout(WEIGHTS, BLOCK_WEIGHT, BLOCK_BIAS, HEAD_LM_HEAD, _combined_config, with_base=True),
}  # fmt: skip
