"""A TensorRT-LLM Medusa checkpoint turned back into Hugging Face tensors, to compare with what it was made from.

Written from TensorRT-LLM's rules and config.json alone: no code is shared with the writer, so each checks the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from medusa_export.exporter.stored import Rows, StoredLinear
from medusa_export.heads.checkpoint import TensorSource
from medusa_export.heads.config import read_json
from medusa_export.heads.errors import CheckpointError

CHUNK_VALUES = 1 << 20  # as in the writer, for the same reason


@dataclass(frozen=True)
class Piece:
    """Rows ``start .. stop - 1`` of one rank's share of a linear."""

    linear: StoredLinear
    start: int
    stop: int


@dataclass(frozen=True)
class Rebuilt:
    """A matrix or vector under its Hugging Face name, put together from the ranks when its rows are read.

    Attributes:
        source: its module's name in the rank files.
        grid: pieces, those of one line side by side, the lines one below the other; empty for a vector.
        vector: a norm or bias, in memory.
    """

    name: str
    source: str
    grid: tuple[tuple[Piece, ...], ...] = ()
    vector: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """As Hugging Face has it."""
        if self.vector is not None:
            return tuple(self.vector.shape)
        rows = sum(line[0].stop - line[0].start for line in self.grid)
        return rows, sum(piece.linear.shape[1] for piece in self.grid[0])

    @property
    def is_quantized(self) -> bool:
        """Whether its values were rounded."""
        return bool(self.grid) and self.grid[0][0].linear.is_quantized

    def chunks(self) -> Iterator[tuple[int, Rows]]:
        """(first row, rows), top to bottom; bounded in memory."""
        if self.vector is not None:
            yield 0, Rows(self.vector)
            return
        step = max(2, CHUNK_VALUES // self.shape[1] // 2 * 2)
        above = 0
        for line in self.grid:
            start, stop = line[0].start, line[0].stop
            for first in range(start, stop, step):
                last = min(first + step, stop)
                rows = Rows.join([piece.linear.rows(first, last) for piece in line], 1)
                yield above + first - start, rows
            above += stop - start

    def tensor(self) -> torch.Tensor:
        """All of it: float32 where it was quantized, otherwise in the file's dtype."""
        return Rows.join([rows for _, rows in self.chunks()], 0).values


def rebuild_hf(trt_dir: Path) -> dict[str, torch.Tensor]:
    """Every weight and bias of base and heads by Hugging Face name, dequantized, all in memory.

    Raises:
        CheckpointError: a missing tensor, ranks that disagree on a replicated one, or padding that is not zero.
    """
    return {item.name: item.tensor() for item in iter_hf(trt_dir)}


def iter_hf(trt_dir: Path) -> Iterator[Rebuilt]:
    """As :func:`rebuild_hf`, to be read in chunks."""
    ranks = _Ranks(trt_dir)
    config = ranks.config
    yield ranks.embedding()
    for layer in range(config["num_hidden_layers"]):
        yield from _layer(ranks, f"transformer.layers.{layer}.", f"model.layers.{layer}.")
    yield ranks.replicated("transformer.ln_f.weight", "model.norm.weight")
    yield _vocabulary(ranks, "lm_head", "lm_head")
    for head in range(config["num_medusa_heads"]):
        for layer in range(config["num_medusa_layers"]):
            source = f"medusa_heads.{head}.medusa_layers.{layer}.linear"
            yield from _joined(ranks, source, f"medusa_heads.{head}.{layer}.linear", 0)
        yield _vocabulary(ranks, f"medusa_heads.{head}.lm_head", f"medusa_heads.{head}.{config['num_medusa_layers']}")


@dataclass(frozen=True)
class InputForm:
    """What happens to a quantized linear's input: its scale and, where the format smooths, a factor a channel."""

    scale: float | None
    smoothing: torch.Tensor | None


def input_forms(trt_dir: Path) -> dict[str, InputForm]:
    """By Hugging Face module name, for every quantized linear."""
    ranks, forms = _Ranks(trt_dir), {}
    for name in ranks.files[0].names:
        module, _, kind = name.rpartition(".")
        linear = ranks.linears(module)[0] if kind == "weight" and module.split(".")[-1] in _QUANTIZABLE else None
        if linear is None or not linear.is_quantized:
            continue
        parts = (
            [file.read(f"{module}.prequant_scaling_factor") for file in ranks.files]
            if ranks.has(f"{module}.prequant_scaling_factor")
            else []
        )
        split = module.endswith((".dense", ".proj"))
        smoothing = (torch.cat(parts) if split else parts[0]) if parts else None
        scale = linear.number("activation_scaling_factor") if ranks.has(f"{module}.activation_scaling_factor") else None
        form = InputForm(scale, smoothing)
        forms.update(dict.fromkeys(_hf_modules(module, ranks.config["num_medusa_layers"]), form))
    return forms


class _Ranks:
    """The rank files of one checkpoint, read side by side."""

    def __init__(self, trt_dir: Path) -> None:
        self.config: dict[str, Any] = read_json(trt_dir / "config.json")
        self.tp = self.config["mapping"]["tp_size"]
        self.algo = self.config["quantization"]["quant_algo"]
        self.files = [TensorSource.open(trt_dir / f"rank{rank}.safetensors") for rank in range(self.tp)]
        for name in self.files[0].names if self.tp > 1 else ():
            if self.files[0].shape(name) == (1,):  # scales a tensor
                self.replicated(name, name)

    def has(self, name: str) -> bool:
        return name in self.files[0]

    def linears(self, module: str) -> list[StoredLinear]:
        """One linear of every rank."""
        return [StoredLinear(file, module, self.algo) for file in self.files]

    def replicated(self, name: str, target: str) -> Rebuilt:
        """A vector that has to be the same on every rank."""
        first, *others = (file.read(name) for file in self.files)
        if not all(torch.equal(first.view(torch.uint8), other.view(torch.uint8)) for other in others):
            raise _differ(name)
        return Rebuilt(target, name.rpartition(".")[0], vector=first)

    def embedding(self) -> Rebuilt:
        """The same on every rank, compared in chunks."""
        module = "transformer.vocab_embedding"
        copies = [
            Rebuilt("model.embed_tokens.weight", module, ((Piece(linear, 0, linear.shape[0]),),))
            for linear in self.linears(module)
        ]
        for other in copies[1:]:
            pairs = zip(copies[0].chunks(), other.chunks(), strict=True)
            if not all(torch.equal(mine.values, theirs.values) for (_, mine), (_, theirs) in pairs):
                raise _differ(f"{module}.weight")
        return copies[0]


def _differ(name: str) -> CheckpointError:
    return CheckpointError(name, "ranks that differ", "the same tensor on every rank", "export again")


def _layer(ranks: _Ranks, source: str, target: str) -> Iterator[Rebuilt]:
    yield ranks.replicated(f"{source}input_layernorm.weight", f"{target}input_layernorm.weight")
    yield ranks.replicated(f"{source}post_layernorm.weight", f"{target}post_attention_layernorm.weight")
    for theirs, ours in (("q_layernorm", "q_norm"), ("k_layernorm", "k_norm")):
        if ranks.has(f"{source}attention.{theirs}.weight"):
            yield ranks.replicated(f"{source}attention.{theirs}.weight", f"{target}self_attn.{ours}.weight")
    yield from _qkv(ranks, f"{source}attention.qkv", f"{target}self_attn")
    yield from _joined(ranks, f"{source}attention.dense", f"{target}self_attn.o_proj", 1)
    yield from _joined(ranks, f"{source}mlp.fc", f"{target}mlp.gate_proj", 0)
    yield from _joined(ranks, f"{source}mlp.gate", f"{target}mlp.up_proj", 0)
    yield from _joined(ranks, f"{source}mlp.proj", f"{target}mlp.down_proj", 1)


def _qkv(ranks: _Ranks, source: str, target: str) -> Iterator[Rebuilt]:
    """Undo the stacking of q, k and v on every rank; copies of a shared key/value head have to agree."""
    config, tp = ranks.config, ranks.tp
    size, kv_heads = config["head_size"], config["num_key_value_heads"]
    counts = [config["num_attention_heads"] // tp * size, *[max(kv_heads // tp, 1) * size] * 2]
    biases = [file.read(f"{source}.bias").split(counts) for file in ranks.files] if ranks.has(f"{source}.bias") else []
    for index, (name, count, stop) in enumerate(
        zip(("q_proj", "k_proj", "v_proj"), counts, accumulate(counts), strict=True)
    ):
        copies = 1 if index == 0 else max(tp // kv_heads, 1)
        pieces = [Piece(linear, stop - count, stop) for linear in ranks.linears(source)]
        _require_equal_copies(source, pieces, copies)
        yield Rebuilt(f"{target}.{name}.weight", source, tuple((piece,) for piece in pieces[::copies]))
        if biases:
            yield Rebuilt(f"{target}.{name}.bias", source, vector=torch.cat([bias[index] for bias in biases][::copies]))


def _require_equal_copies(source: str, pieces: list[Piece], copies: int) -> None:
    for index, piece in enumerate(pieces):
        first = pieces[index - index % copies]
        if first is not piece and not torch.equal(
            *(each.linear.rows(each.start, each.stop).values for each in (first, piece))
        ):
            raise CheckpointError(source, "ranks that differ in a shared head", "equal copies", "export again")


def _joined(ranks: _Ranks, source: str, target: str, axis: int) -> Iterator[Rebuilt]:
    """A linear split on its outputs (axis 0, bias too) or its inputs (axis 1, bias whole)."""
    pieces = [Piece(linear, 0, linear.shape[0]) for linear in ranks.linears(source)]
    yield Rebuilt(f"{target}.weight", source, tuple((piece,) for piece in pieces) if axis == 0 else (tuple(pieces),))
    bias = f"{source}.bias"
    if ranks.has(bias) and axis == 0:
        yield Rebuilt(f"{target}.bias", source, vector=torch.cat([file.read(bias) for file in ranks.files]))
    elif ranks.has(bias):
        yield ranks.replicated(bias, f"{target}.bias")


def _vocabulary(ranks: _Ranks, source: str, target: str) -> Rebuilt:
    """Rows split over the ranks, the last ones padding."""
    left, pieces = ranks.config["vocab_size"], []
    for linear in ranks.linears(source):
        rows = linear.shape[0]
        used = min(rows, left)
        padding = Rebuilt("", source, ((Piece(linear, used - used % 2, rows),),))  # two rows may share a byte
        if used < rows and any(part.values[used % 2 * (first == 0) :].any() for first, part in padding.chunks()):
            got = "padding rows that are not zero"
            raise CheckpointError(f"{source}.weight", got, "zeros at the end", "export again")
        if used:
            pieces.append((Piece(linear, 0, used),))
        left -= used
    return Rebuilt(f"{target}.weight", source, tuple(pieces))


_LINEARS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}
_QUANTIZABLE = {*(name.split(".")[-1] for name in _LINEARS), "linear", "lm_head"}


def _hf_modules(module: str, num_medusa_layers: int) -> list[str]:
    """``transformer.layers.0.mlp.fc`` -> ``model.layers.0.mlp.gate_proj`` and so on."""
    parts = module.split(".")
    if parts[0] == "medusa_heads":
        last = f"{parts[3]}.linear" if parts[2] == "medusa_layers" else str(num_medusa_layers)
        return [f"medusa_heads.{parts[1]}.{last}"]
    return [f"model.layers.{parts[2]}.{name}" for name in _LINEARS[".".join(parts[3:])]]
