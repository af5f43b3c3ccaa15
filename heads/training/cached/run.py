"""From conversations to heads on a frozen base, through cached hidden states: see ``hidden_states`` and ``trainer``."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from medusa_export.core.artifacts.manifest import hash_files, package_versions
from medusa_export.core.artifacts.staging import publish
from medusa_export.core.errors import ConfigError
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint, load_reference
from medusa_export.heads.training.cached.arguments import HeadShape, TrainArguments
from medusa_export.heads.training.cached.state import TrainState
from medusa_export.heads.training.cached.trainer import train_heads
from medusa_export.heads.training.dataset import Example, data_hash
from medusa_export.heads.training.head_module import MedusaHeads
from medusa_export.heads.training.hidden_states import Rows, build_cache, cache_bytes
from medusa_export.heads.training.report import LOGS, measure, write_followers, write_report, write_tensorboard
from medusa_export.heads.training.start import head_shape
from medusa_export.heads.training.workdir import training_work

Progress = Callable[[str, int, int], None]
Say = Callable[[str], None]


def train_fast(
    model_dir: Path,
    dataset: Sequence[Example],
    held_out: Sequence[Example],
    output: Path,
    arguments: TrainArguments,
    shape: HeadShape,
    *,
    heads: Path | None = None,
    cache: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Train heads, and write them with their report to ``output``; the same call continues what was interrupted.

    Args:
        model_dir: Hugging Face directory of the base model.
        held_out: conversations that accuracies are measured on.
        output: made in the end, at once; must not exist, or be empty.
        heads: existing heads of the same shape to start from.
        cache: directory of hidden states that is kept; None: one beside the output that is removed in the end.
        progress: called with (stage, done, total).
        say: called with lines that a user wants to know.

    Returns:
        what ``acceptance.json`` holds.

    Raises:
        MedusaExportError: bad input, no room for the cache, or a loss that is not finite.
    """
    arguments.check()
    if arguments.start_share and heads is None:
        raise ConfigError("--start-share", f"{arguments.start_share} of no heads", "--heads with it", "pass --heads")
    shape.check()
    head_shape(model_dir, heads, **vars(shape), takes_more=True)
    started = time.monotonic()
    base = MedusaCheckpoint.open_base(model_dir)
    with training_work(output) as work:
        weights = {Path(name).name: digest for name, digest in hash_files(base.files).items()}
        wanted = {"arguments": arguments.recorded(), "shape": vars(shape), "base_model": weights}
        wanted |= _inputs(dataset, held_out, heads)
        caches = _Caches(model_dir, base, cache or work / "cache", _digest(weights), arguments.bf16, progress)
        caches.announce([*dataset, *held_out], say)
        rows, held = caches.rows({"training states": dataset, "held-out states": held_out})
        module = _new_heads(base, shape, heads, model_dir).to(device())
        state = train_heads(
            module, rows, held, arguments, checkpoint=work / f"{_digest(wanted)}.safetensors",
            progress=partial(progress, "training"),
        )  # fmt: skip
        if arguments.start_share:
            module.average(_new_heads(base, shape, heads, model_dir), arguments.start_share)
        found = measure(module, held)
        record = wanted | {
            "rows": len(rows), "epochs": state.epochs, "seconds": round(time.monotonic() - started, 1),
            "versions": package_versions(),
        }  # fmt: skip
        files = _write(work, module, base.config, dataset, held, record, found, state)
        publish(files, output)
        shutil.rmtree(work)
    return found


def _inputs(dataset: Sequence[Example], held_out: Sequence[Example], heads: Path | None) -> dict[str, Any]:
    """What is trained on and from, by its hashes."""
    return {
        "data": {"train": data_hash(dataset), "held_out": data_hash(held_out)},
        "from_heads": None if heads is None else sorted(hash_files(heads_files(heads)).values()),
    }


def device() -> torch.device:
    """The accelerator, or the CPU where there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def heads_files(path: Path) -> list[Path]:
    """What a heads directory is made of."""
    return (
        [path] if path.is_file() else sorted(item for item in path.glob("*") if item.suffix in (".safetensors", ".pt"))
    )


@dataclass(frozen=True)
class _Caches:
    """Hidden states of one base model, in one directory."""

    model_dir: Path
    base: MedusaCheckpoint
    directory: Path
    weights: str
    bf16: bool
    progress: Progress

    def announce(self, examples: Sequence[Example], say: Say) -> None:
        size = cache_bytes(examples, self.base.config.hidden_size)
        tokens = sum(len(example.input_ids) for example in examples)
        say(f"hidden states of {tokens:,} tokens, {size / 1e6:,.0f} MB in {self.directory}")

    def rows(self, stages: Mapping[str, Sequence[Example]]) -> list[Rows]:
        """Of the examples of every stage; the model is loaded once, if at all, and given up in the end."""
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        model = cache(lambda: load_reference(self.model_dir, dtype, device()))
        return [
            build_cache(
                self.directory, model, examples, key=f"{self.weights} {dtype}", hidden_size=self.base.config.hidden_size,
                progress=partial(self.progress, stage),
            )
            for stage, examples in stages.items()
        ]  # fmt: skip


def _new_heads(base: MedusaCheckpoint, shape: HeadShape, stored: Path | None, model_dir: Path) -> MedusaHeads:
    lm_head = base.read("lm_head.weight").float()
    module = MedusaHeads(shape.num_heads, shape.num_layers, lm_head, own_lm_head=shape.own_lm_head)
    if stored is None:
        return module
    module.load(MedusaCheckpoint.open(model_dir, stored))
    return module


def _write(
    work: Path, module: MedusaHeads, base: DecoderConfig, dataset: Sequence[Example], held: Rows, record: dict[str, Any],
    found: dict[str, Any], state: TrainState,
) -> Path:  # fmt: skip
    files = work / "files"
    shutil.rmtree(files, ignore_errors=True)
    files.mkdir()
    module.save(files, getattr(torch, base.dtype))
    write_followers(files, dataset, base.vocab_size, module, held)
    curves = {"loss": state.losses}
    write_report(files, record, found, curves)
    accuracy = {
        f"head{number}_top1": [(epoch["step"], epoch["heads"][number]["top1"]) for epoch in state.epochs]
        for number in range(module.num_heads)
    }
    write_tensorboard(files / LOGS, curves | accuracy)
    return files


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
