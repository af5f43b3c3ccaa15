"""Every number of a written checkpoint against the model that it was made from, rank by rank, also while a rank is being written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medusa_export.core.threads import StopPoint, run_torch
from medusa_export.exporter.verify.dequantize import BoundedRows
from medusa_export.exporter.verify.rebuild import (
    Place,
    Rebuilt,
    layout,
    open_ranks,
    require_equal_scales,
    require_zeros,
)
from medusa_export.exporter.verify.trtllm_loader.config import read_config
from medusa_export.exporter.verify.trtllm_loader.rope import same_frequencies
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.checkpoint.tensor_source import TensorSource

ROUNDING = 1.001  # slack for the float32 arithmetic of the comparison itself

CONFIG_PAIRS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "hidden_act": "hidden_act",
    "norm_epsilon": "rms_norm_eps",
    "rotary_base": "rope_theta",
    "max_position_embeddings": "max_position_embeddings",
    "attn_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
}


@dataclass(frozen=True)
class WeightError:
    """What quantization did to one tensor.

    Attributes:
        largest: of the absolute differences, in units of the weight.
        snr_db: 10 log10 of the weights' energy over the differences'.
    """

    largest: float
    snr_db: float


@dataclass
class Difference:
    """What was found of one Hugging Face tensor so far.

    Attributes:
        wrong: values further off than the format rounds.
        wrong_copies: the same, of what other ranks hold a second time.
        noise, energy: sums of squares, of the differences and of the source's values.
    """

    wrong: int = 0
    largest: float = 0.0
    noise: float = 0.0
    energy: float = 0.0
    wrong_copies: int = 0

    def add(self, other: Difference) -> None:
        """Take another part of the same tensor in."""
        self.wrong, self.wrong_copies = self.wrong + other.wrong, self.wrong_copies + other.wrong_copies
        self.largest = max(self.largest, other.largest)
        self.noise, self.energy = self.noise + other.noise, self.energy + other.energy

    @property
    def error(self) -> WeightError:
        """As a signal-to-noise ratio."""
        return WeightError(self.largest, 10 * math.log10(max(self.energy, 1e-30) / max(self.noise, 1e-30)))


class RankComparison:
    """One rank file against the source, module by module, as soon as the file has all of a module.

    A 16-bit weight has to be the source's, cast. A dequantized weight may be half a step off, element by element: this finds q, k
    and v in the wrong order, fc and gate swapped, heads swapped and wrong scales. Some rows are in memory at a time.

    Args:
        config: config.json of the TensorRT-LLM checkpoint.
        file: the rank's.

    Attributes:
        found: by Hugging Face name.
        shapes: of the Hugging Face tensors, as the rank files would give them.
    """

    def __init__(self, config: Mapping[str, Any], rank: int, file: TensorSource, checkpoint: MedusaCheckpoint) -> None:
        items = list(layout(config, [file] * config["mapping"]["tp_size"]))
        self.found: dict[str, Difference] = {}
        self.shapes = {item.name: item.shape for item in items}
        self.quantized = {item.name for item in items if item.is_quantized}
        self._rank, self._checkpoint = rank, checkpoint
        self._missing = Counter(_module(name) for name in file.names)
        self._items: dict[str, list[Rebuilt]] = {}
        for item in items:
            self._items.setdefault(item.source, []).append(item)

    def written(self, name: str) -> None:
        """Take note that the file has this tensor; compares its module once it is the last one.

        Raises:
            CheckpointError: padding that is not zero.
        """
        module = _module(name)
        self._missing[module] -= 1
        if not self._missing[module]:
            self._compare(module)

    def everything(self, stop_point: StopPoint = lambda: None) -> None:
        """Compare all of a file that is complete."""
        for module in self._items:
            stop_point()
            self._compare(module)

    def _compare(self, module: str) -> None:
        for item in self._items.get(module, ()):
            if item.name not in self._checkpoint or item.shape != self._checkpoint.shape(item.name):
                continue  # see Comparison.problems
            for place in item.places():
                if place.piece.rank == self._rank:
                    self.found.setdefault(item.name, Difference()).add(_difference(item.name, place, self._checkpoint))
            for piece in item.padding:
                if piece.rank == self._rank:
                    require_zeros(piece, item.source)


class Comparison:
    """All ranks of a checkpoint against the source; ranks may be compared on several threads.

    Args:
        config: config.json of the TensorRT-LLM checkpoint.
    """

    def __init__(self, config: Mapping[str, Any], checkpoint: MedusaCheckpoint) -> None:
        self._config, self._checkpoint = config, checkpoint
        self._ranks: dict[int, RankComparison] = {}

    def begin(self, rank: int, path: Path) -> Callable[[str], None]:
        """A rank file that has its header and its length; what is returned has to get the name of every tensor once it is there."""
        return self._add(rank, TensorSource.open_unfinished(path)).written

    def take(self, rank: int, path: Path, stop_point: StopPoint = lambda: None) -> None:
        """Compare all of a finished rank file.

        Args:
            rank: its number.
            path: its file.
            stop_point: called between tensors; raises to end the comparison.
        """
        self._add(rank, TensorSource.open(path)).everything(stop_point)

    def _add(self, rank: int, file: TensorSource) -> RankComparison:
        self._ranks[rank] = RankComparison(self._config, rank, file, self._checkpoint)
        return self._ranks[rank]

    def problems(self) -> list[str]:
        """What is wrong, one line a tensor."""
        shapes, names, all_found = self._any.shapes, self._checkpoint.names, self._found()
        problems = [f"{name}: not in the source checkpoint" for name in shapes if name not in set(names)]
        problems += [f"{name}: lost" for name in names if name not in shapes]
        for name in names:
            expected = self._checkpoint.shape(name)
            if name in shapes and shapes[name] != expected:
                problems.append(f"{name}: shape {list(shapes[name])}, the source has {list(expected)}")
            elif found := all_found.get(name):
                problems += _wrong_values(name, found, math.prod(expected))
        return problems

    def errors(self) -> dict[str, WeightError]:
        """What quantization did to every quantized tensor, in the source's order."""
        found = self._found()
        quantized = self._any.quantized & found.keys()
        return {name: found[name].error for name in self._checkpoint.names if name in quantized}

    @property
    def _any(self) -> RankComparison:
        """Ranks are laid out alike."""
        return next(iter(self._ranks.values()))

    def _found(self) -> dict[str, Difference]:
        """Totals over the ranks, summed in their order."""
        found: dict[str, Difference] = {}
        for _, rank in sorted(self._ranks.items()):
            for name, difference in rank.found.items():
                found.setdefault(name, Difference()).add(difference)
        return found


def weight_problems(trt_dir: Path, checkpoint: MedusaCheckpoint, compared: Comparison | None = None) -> list[str]:
    """Problems of a checkpoint's numbers: config values, names, and weights further off than its format rounds.

    Args:
        compared: the ranks, where they were compared when they were written.

    Raises:
        CheckpointError: files that cannot be put back together (ranks that disagree, padding that is not zero).
    """
    config = read_config(trt_dir)
    problems = config_differences(config, checkpoint)
    if problems:
        return problems
    require_equal_scales(open_ranks(trt_dir, config))
    return (compared or compare_ranks(trt_dir, checkpoint)).problems()


def compare_ranks(trt_dir: Path, checkpoint: MedusaCheckpoint) -> Comparison:
    """All ranks of a finished checkpoint against the source."""
    config = read_config(trt_dir)
    compared = Comparison(config, checkpoint)

    def take(rank: int, stop_point: StopPoint) -> None:
        compared.take(rank, trt_dir / f"rank{rank}.safetensors", stop_point)

    run_torch(take, range(config["mapping"]["tp_size"]))
    return compared


def config_differences(config: Mapping[str, Any], checkpoint: MedusaCheckpoint) -> list[str]:
    """Config values that the weights cannot show, but that change every prediction."""
    source = checkpoint.config
    pairs = {theirs: (config.get(theirs), getattr(source, ours)) for theirs, ours in CONFIG_PAIRS.items()}
    pairs["num_medusa_heads"] = (config.get("num_medusa_heads"), checkpoint.num_medusa_heads)
    pairs["num_medusa_layers"] = (config.get("num_medusa_layers"), checkpoint.num_medusa_layers)
    optional = {"qwen_type": source.family.trtllm.model_type, "tie_word_embeddings": source.tie_word_embeddings}
    pairs |= {key: (config[key], expected) for key, expected in optional.items() if key in config}
    problems = [
        f"config.json: {key} is {got!r}, the source has {expected!r}"
        for key, (got, expected) in pairs.items()
        if got != expected
    ]
    if not problems and not same_frequencies(config, source.raw, source.head_dim):
        problems.append(
            f"config.json: rotary_scaling {config.get('rotary_scaling')} gives other frequencies than the source's"
        )
    return problems


def _wrong_values(name: str, found: Difference, count: int) -> Iterator[str]:
    if found.wrong:
        relative = math.sqrt(found.noise / max(found.energy, 1e-30))
        yield f"{name}: {found.wrong} of {count} values are not the source's (relative error {relative:.3g})"
    elif found.wrong_copies:
        yield f"{name}: {found.wrong_copies} values are not the source's on ranks that hold it again"


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _difference(name: str, place: Place, checkpoint: MedusaCheckpoint) -> Difference:
    """One rank's piece of a tensor against the same rows and columns of the source."""
    found, width = Difference(), place.piece.stored.shape[1:]
    for first, rows in place.piece.chunks():
        start = place.row + first
        source = checkpoint.read_rows(name, start, start + len(rows.values))
        if width and width[0] != source.shape[1]:
            source = source[:, place.column : place.column + width[0]]
        source = source.to(rows.values.dtype)
        if rows.absolute is None and _same_bits(rows.values, source):
            continue
        found.add(_rounding(rows, source.to(torch.float32)))
    # the other tensors of a rank tell nothing new about the format
    return Difference(wrong_copies=found.wrong) if place.is_copy else found


def _rounding(rows: BoundedRows, expected: torch.Tensor) -> Difference:
    """Uses the rows' memory up: fresh memory costs more than the arithmetic."""
    error = torch.sub(rows.values, expected)
    noise, energy = (float(torch.dot(each.flatten(), each.flatten())) for each in (error, expected))
    left, absolute = rows.values.to(torch.float32).abs_(), torch.zeros(()) if rows.absolute is None else rows.absolute
    torch.add(ROUNDING * absolute, left, alpha=ROUNDING * rows.relative, out=left).sub_(
        error.abs_()
    )  # of what rounding may do
    is_right = bool(left.min() >= 0)  # NaN is not
    wrong = 0 if is_right else left.numel() - int((left >= 0).sum())
    return Difference(wrong, float(error.max()), noise, energy)


def _same_bits(values: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of 16 or 32 bits are equal bit by bit, compared eight bytes at a time."""
    left, right = (each.contiguous().reshape(-1) for each in (values, other))
    if left.nbytes % 8 == 0:
        left, right = left.view(torch.int64), right.view(torch.int64)
    return torch.equal(left, right)
