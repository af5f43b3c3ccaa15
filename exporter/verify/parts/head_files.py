"""``heads/``: Medusa heads alone, in the layout that was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from medusa_export.core.json_fields import read_json
from medusa_export.exporter.verify.dequantize import BoundedRows
from medusa_export.exporter.verify.findings import Findings
from medusa_export.exporter.verify.numbers import SourceNumbers, weight_differences
from medusa_export.exporter.verify.parts.source import Source
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.checkpoint.tensor_source import TensorSource

COUNTS = ("medusa_num_heads", "num_heads")


@dataclass(frozen=True)
class HeadTensor:
    """One tensor of heads, under its canonical name."""

    name: str
    shape: tuple[int, ...]
    checkpoint: MedusaCheckpoint

    def row_numbers(self, start: int, stop: int) -> torch.Tensor | None:
        return None

    def rows(self, start: int, stop: int) -> BoundedRows:
        return BoundedRows(self.checkpoint.read_rows(self.name, start, stop))


def check_heads(path: Path, source: Source | None, ckpt: str, findings: Findings) -> None:
    """Say what is wrong with the directory; without a source, what it says against itself.

    Args:
        ckpt: the base model that the manifest records.
    """
    with findings.guarded("heads"):
        if source is None:
            findings.say("heads", _own_problems(path))
            return
        written, original = MedusaCheckpoint.open(source.ckpt, path), source.checkpoint
        counts = [(each.num_medusa_heads, each.num_medusa_layers) for each in (written, original)]
        if counts[0] != counts[1]:
            findings.say("heads", [f"{counts[0]} heads and layers; the source has {counts[1]}"])
            return
        names = original.heads.canonical_names()
        tensors = [HeadTensor(name, written.shape(name), written) for name in names]
        findings.say("heads", weight_differences(tensors, SourceNumbers(original), "the source's"))
        findings.say(
            "heads",
            (
                f"{n}: {written.dtype(n)}; the source has {original.dtype(n)}"
                for n in names
                if written.dtype(n) != original.dtype(n)
            ),
        )
        expected = _expected(original)
        config = read_json(path / "config.json")
        findings.say(
            "heads",
            (
                f"config.json: {key} is {config[key]!r}, the source has {value!r}"
                for key, value in expected.items()
                if key in config and config[key] != value
            ),
        )
        base = config.get("base_model_name_or_path", ckpt)
        if base not in (ckpt, str(source.ckpt), original.config.raw.get("_name_or_path")):
            findings.say("heads", [f"config.json: base_model_name_or_path is {base!r}; the manifest says {ckpt!r}"])


def _expected(checkpoint: MedusaCheckpoint) -> dict[str, object]:
    """Values of config.json, in whichever layout."""
    config, heads, layers = checkpoint.config, checkpoint.num_medusa_heads, checkpoint.num_medusa_layers
    return {
        "medusa_num_heads": heads, "medusa_num_layers": layers, "num_heads": heads, "num_hidden_layers": layers,
        "hidden_size": config.hidden_size, "vocab_size": config.vocab_size, "truncated_vocab_size": config.vocab_size,
    }  # fmt: skip


def _own_problems(path: Path) -> Iterator[str]:
    weights = sorted(path.glob("*.safetensors"))
    if len(weights) != 1:
        yield f"{len(weights)} files of weights; expected one"
        return
    file, config = TensorSource.open(weights[0]), read_json(path / "config.json")
    numbers = {part for name in file.names for part in [next((p for p in name.split(".") if p.isdigit()), "")] if part}
    count = next((config[key] for key in COUNTS if key in config), None)
    blocks = {name for name in file.names if "linear" in name or name.startswith("blocks.")}
    heads = {next(part for part in name.split(".") if part.isdigit()) for name in blocks}
    if count != len(heads) or not heads >= numbers:
        yield f"config.json: {count} heads, and there are {len(heads)}"
    shapes = {file.shape(name) for name in blocks if name.endswith("weight")}
    hidden = config.get("hidden_size")
    if shapes != {(hidden, hidden)}:
        yield f"config.json: hidden_size {hidden}, and the blocks are {sorted(shapes)}"
    kinds: dict[str, set[str]] = {}
    for name in file.names:
        prefix, number, rest = _parts(name)
        if number and not (prefix == "lm_heads." and sum(each.startswith(prefix) for each in file.names) == 1):
            kinds.setdefault(number, set()).add(prefix + rest)
        values = file.read(name).to(torch.float32)
        if not bool(torch.isfinite(values).all()):
            yield f"{name} has values that are not finite"
        elif len(values.shape) == 2 and not bool(values.any()):
            yield f"{name} is zero"
        rows = (
            len(values)
            if len(values.shape) == 2 and ".linear." not in name and not name.startswith("blocks.")
            else None
        )
        if rows is not None and rows != config.get("vocab_size", rows):
            yield f"config.json: vocab_size {config['vocab_size']}, and {name} has {rows} rows"
    if len({frozenset(names) for names in kinds.values()}) > 1:
        yield "the heads do not have the same tensors"
    if len(dtypes := {file.dtype(name) for name in file.names}) > 1:
        yield f"the tensors are {' and '.join(sorted(dtypes))}"


def _parts(name: str) -> tuple[str, str, str]:
    """What stands before a head's number, the number, and what stands behind it."""
    words = name.split(".")
    at = next((index for index, word in enumerate(words) if word.isdigit()), None)
    if at is None:
        return name, "", ""
    return ".".join([*words[:at], ""]), words[at], ".".join(words[at + 1 :])
