"""A TensorRT-LLM Medusa checkpoint turned back into Hugging Face tensors, to compare with what it was made from.

Written from TensorRT-LLM's rules and config.json alone: no code is shared with the writer, so each checks the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from medusa_export.core.errors import CheckpointError
from medusa_export.exporter.verify.dequantize import BoundedRows, StoredLinear, StoredVector
from medusa_export.exporter.verify.trtllm_loader.config import read_config
from medusa_export.heads.checkpoint.tensor_source import TensorSource

CHUNK_VALUES = 1 << 20  # as in the writer, for the same reason


@dataclass(frozen=True)
class RankPiece:
    """Rows ``start .. stop - 1`` of what one rank holds of a matrix or vector."""

    rank: int
    stored: StoredLinear | StoredVector
    start: int
    stop: int

    @property
    def height(self) -> int:
        """Number of rows."""
        return self.stop - self.start

    def chunks(self) -> Iterator[tuple[int, BoundedRows]]:
        """(first row of the piece, rows), top to bottom; bounded in memory."""
        step = _rows_a_chunk(self.stored.shape)
        for first in range(self.start, self.stop, step):
            yield first - self.start, self.stored.rows(first, min(first + step, self.stop))


@dataclass(frozen=True)
class Place:
    """Where a piece belongs.

    Attributes:
        row, column: of its first value in the Hugging Face tensor.
        is_copy: another rank holds the same.
    """

    piece: RankPiece
    row: int
    column: int = 0
    is_copy: bool = False


@dataclass(frozen=True)
class Rebuilt:
    """A matrix or vector under its Hugging Face name, put together from the ranks when its rows are read.

    Attributes:
        source: its module's name in the rank files.
        grid: pieces, those of one line side by side, the lines one below the other.
        copies: pieces that have to be equal to rows of the grid, and the first of those rows.
        padding: pieces that belong nowhere, and have to be zero.
    """

    name: str
    source: str
    grid: tuple[tuple[RankPiece, ...], ...]
    copies: tuple[tuple[RankPiece, int], ...] = ()
    padding: tuple[RankPiece, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the Hugging Face tensor."""
        rows = sum(line[0].height for line in self.grid)
        widths = [piece.stored.shape[1] for piece in self.grid[0] if len(piece.stored.shape) > 1]
        return (rows, sum(widths)) if widths else (rows,)

    @property
    def is_quantized(self) -> bool:
        """Whether its values were rounded."""
        return self.grid[0][0].stored.is_quantized

    def places(self) -> Iterator[Place]:
        """Every piece but the padding, and where it belongs."""
        row = 0
        for line in self.grid:
            column = 0
            for piece in line:
                yield Place(piece, row, column)
                column += piece.stored.shape[-1]
            row += line[0].height
        for piece, row in self.copies:
            yield Place(piece, row, is_copy=True)

    def tensor(self) -> torch.Tensor:
        """All of it: float32 where it was quantized, otherwise in the file's dtype.

        Raises:
            CheckpointError: copies that differ, or padding that is not zero.
        """
        values = torch.cat([self._line(line) for line in self.grid])
        for piece, row in self.copies:
            for first, rows in piece.chunks():
                same = values[row + first : row + first + len(rows.values)]
                if not torch.equal(_bits(rows.values), _bits(same)):
                    raise _differ(self.source)
        for piece in self.padding:
            require_zeros(piece, self.source)
        return values

    def _line(self, line: tuple[RankPiece, ...]) -> torch.Tensor:
        return torch.cat([torch.cat([rows.values for _, rows in piece.chunks()]) for piece in line], dim=-1)


def require_zeros(piece: RankPiece, source: str) -> None:
    """Raise CheckpointError when a padding row holds something."""
    if any(rows.values.any() for _, rows in piece.chunks()):
        got = "padding rows that are not zero"
        raise CheckpointError(f"{source}.weight", got, "zeros at the end", "export again")


def rebuild_hf(trt_dir: Path) -> dict[str, torch.Tensor]:
    """Every weight and bias of base and heads by Hugging Face name, dequantized, all in memory.

    Raises:
        CheckpointError: a missing tensor, ranks that disagree on a replicated one, or padding that is not zero.
    """
    config = read_config(trt_dir)
    files = open_ranks(trt_dir, config)
    require_equal_scales(files)
    return {item.name: item.tensor() for item in layout(config, files)}


def open_ranks(trt_dir: Path, config: Mapping[str, Any]) -> list[TensorSource]:
    """The rank files of a checkpoint."""
    return [TensorSource.open(trt_dir / f"rank{rank}.safetensors") for rank in range(config["mapping"]["tp_size"])]


def require_equal_scales(files: Sequence[TensorSource]) -> None:
    """Raise CheckpointError when ranks have other scales a tensor: the quantized copies of a tensor would mean other weights."""
    for name in files[0].names if len(files) > 1 else ():
        if files[0].shape(name) == (1,):
            first, *others = (_bits(file.read_rows(name, 0, 1)) for file in files)
            if not all(torch.equal(first, other) for other in others):
                raise _differ(name)


def layout(config: Mapping[str, Any], files: Sequence[TensorSource]) -> Iterator[Rebuilt]:
    """Where every Hugging Face tensor lies in the rank files; reads headers only.

    Args:
        files: of the ranks, in their order. Ranks are laid out alike, so one file may stand for those that are not there yet.
    """
    ranks = _Ranks(config, files)
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
    config = read_config(trt_dir)
    ranks, forms = _Ranks(config, open_ranks(trt_dir, config)), dict[str, InputForm]()
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
        forms.update(dict.fromkeys(hf_modules(module, ranks.config["num_medusa_layers"]), form))
    return forms


class _Ranks:
    """The rank files of one checkpoint, side by side."""

    def __init__(self, config: Mapping[str, Any], files: Sequence[TensorSource]) -> None:
        self.config, self.files, self.tp = config, files, config["mapping"]["tp_size"]
        self.algo = config["quantization"]["quant_algo"]

    def has(self, name: str) -> bool:
        return name in self.files[0]

    def linears(self, module: str) -> list[StoredLinear]:
        """One linear of every rank."""
        return [StoredLinear(file, module, self.algo) for file in self.files]

    def whole(self, stored: Sequence[StoredLinear | StoredVector]) -> list[RankPiece]:
        """All rows of every rank's share."""
        return [RankPiece(rank, each, 0, each.shape[0]) for rank, each in enumerate(stored)]

    def vectors(self, name: str) -> list[RankPiece]:
        """One vector of every rank."""
        return self.whole([StoredVector(file, name) for file in self.files])

    def replicated(self, name: str, target: str) -> Rebuilt:
        """A vector that has to be the same on every rank."""
        return _copied(target, name.rpartition(".")[0], self.vectors(name))

    def embedding(self) -> Rebuilt:
        """The same on every rank."""
        module = "transformer.vocab_embedding"
        return _copied("model.embed_tokens.weight", module, self.whole(self.linears(module)))


def _copied(name: str, source: str, pieces: Sequence[RankPiece]) -> Rebuilt:
    return Rebuilt(name, source, ((pieces[0],),), copies=tuple((piece, 0) for piece in pieces[1:]))


def _differ(name: str) -> CheckpointError:
    return CheckpointError(name, "ranks that differ", "the same tensor on every rank", "export again")


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().reshape(-1).view(torch.uint8)


def _rows_a_chunk(shape: tuple[int, ...]) -> int:
    return max(2, CHUNK_VALUES // max(1, *shape[1:], 1) // 2 * 2)


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
    """Undo the stacking of q, k and v on every rank; a key/value head that ranks share has copies."""
    config, tp = ranks.config, ranks.tp
    size, kv_heads = config["head_size"], config["num_key_value_heads"]
    counts = [config["num_attention_heads"] // tp * size, *[max(kv_heads // tp, 1) * size] * 2]
    stored: dict[str, Sequence[StoredLinear | StoredVector]] = {"weight": ranks.linears(source)}
    if ranks.has(f"{source}.bias"):
        stored["bias"] = [piece.stored for piece in ranks.vectors(f"{source}.bias")]
    for name, count, stop in zip(("q_proj", "k_proj", "v_proj"), counts, accumulate(counts), strict=True):
        sharing = 1 if name == "q_proj" else max(tp // kv_heads, 1)
        for suffix, each in stored.items():
            pieces = [RankPiece(rank, part, stop - count, stop) for rank, part in enumerate(each)]
            grid = tuple((piece,) for piece in pieces[::sharing])
            copies = ((p, index // sharing * count) for index, p in enumerate(pieces) if index % sharing)
            yield Rebuilt(f"{target}.{name}.{suffix}", source, grid, tuple(copies))


def _joined(ranks: _Ranks, source: str, target: str, axis: int) -> Iterator[Rebuilt]:
    """A linear split on its outputs (axis 0, bias too) or its inputs (axis 1, bias whole)."""
    pieces = ranks.whole(ranks.linears(source))
    yield Rebuilt(f"{target}.weight", source, tuple((piece,) for piece in pieces) if axis == 0 else (tuple(pieces),))
    bias = f"{source}.bias"
    if ranks.has(bias) and axis == 0:
        yield Rebuilt(f"{target}.bias", source, tuple((piece,) for piece in ranks.vectors(bias)))
    elif ranks.has(bias):
        yield ranks.replicated(bias, f"{target}.bias")


def _vocabulary(ranks: _Ranks, source: str, target: str) -> Rebuilt:
    """Rows split over the ranks, the last ones padding."""
    left, pieces, padding = ranks.config["vocab_size"], [], []
    for whole in ranks.whole(ranks.linears(source)):
        used = min(whole.stop, left)
        if used:
            pieces.append((replace(whole, stop=used),))
        if used < whole.stop:
            padding.append(replace(whole, start=used))
        left -= used
    return Rebuilt(f"{target}.weight", source, tuple(pieces), padding=tuple(padding))


_LINEARS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}
_QUANTIZABLE = {*(name.split(".")[-1] for name in _LINEARS), "linear", "lm_head"}


def hf_modules(module: str, num_medusa_layers: int) -> list[str]:
    """``transformer.layers.0.mlp.fc`` -> ``model.layers.0.mlp.gate_proj`` and so on."""
    parts = module.split(".")
    if parts[0] == "medusa_heads":
        last = f"{parts[3]}.linear" if parts[2] == "medusa_layers" else str(num_medusa_layers)
        return [f"medusa_heads.{parts[1]}.{last}"]
    return [f"model.layers.{parts[2]}.{name}" for name in _LINEARS[".".join(parts[3:])]]
