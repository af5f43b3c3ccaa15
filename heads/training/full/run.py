"""Training heads, alone or with the base model, in stages that can be interrupted; on one process or under torchrun."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback

from medusa_export.core.artifacts.staging import publish
from medusa_export.core.errors import ConfigError, OutputError
from medusa_export.heads.training.dataset import Example, data_hash
from medusa_export.heads.training.full.arguments import ReferenceArguments, training_arguments
from medusa_export.heads.training.full.model import Built, Extension, MedusaTraining, build, check_examples
from medusa_export.heads.training.full.output import write_output
from medusa_export.heads.training.full.trainer import MedusaTrainer, load_trained
from medusa_export.heads.training.workdir import training_work, work_beside

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"
LOGS = "logs"
Progress = Callable[[str, int, int], None]
History = dict[str, list[dict[str, Any]]]
Report = Callable[[Any, Path, History], None]


@dataclass(frozen=True)
class Stage:
    """Some optimizer steps, with the base model frozen or not."""

    name: str
    steps: int
    freeze_base: bool


@dataclass(frozen=True)
class ReferenceReport:
    """What a training did.

    Attributes:
        stages: in their order; an early stop makes fewer steps than they have.
        metrics: on held-out data, after the training, see ``reference_trainer.metrics``; empty without such data.
        base_change: relative change of the base model's weights as stored (Frobenius norms); 0 where it was frozen.
        history: what was logged, by stage: dictionaries with ``step``, and ``loss`` or ``eval_...``.
    """

    stages: tuple[Stage, ...]
    metrics: dict[str, float]
    base_change: float
    history: History


def stages(arguments: ReferenceArguments, examples: int, processes: int = 1) -> tuple[Stage, ...]:
    """What is trained one after the other: heads, or a share of the steps heads and then everything.

    Args:
        arguments: epochs, batch and share of the heads' own stage.
        examples: conversations of an epoch.
        processes: ranks that share a batch.
    """
    micro = math.ceil(examples / (arguments.batch_size * processes))
    steps = arguments.max_steps or math.ceil(math.ceil(micro / arguments.accumulate) * arguments.epochs)
    if not arguments.trains_base:
        return (Stage("heads", steps, True),)
    alone = min(round(arguments.warmup_heads * steps), steps - 1)
    found = (Stage("heads", alone, True), Stage("joint", steps - alone, False))
    return tuple(stage for stage in found if stage.steps)


def train_reference(
    model_dir: Path,
    dataset: Sequence[Example],
    output: Path,
    arguments: ReferenceArguments,
    *,
    held_out: Sequence[Example] = (),
    heads: Path | None = None,
    extension: Extension | None = None,
    progress: Progress = lambda stage, done, total: None,
    report: Report = lambda model, out, history: None,
) -> ReferenceReport:
    """Train, and write heads, or base and heads, to ``output``; the same call continues what was interrupted.

    Under ``torchrun`` every process calls it; the first one writes.

    Args:
        model_dir: Hugging Face directory of the base model.
        dataset: conversations; none longer than the model's positions.
        output: made in the end, at once; must not exist, or be empty.
        held_out: conversations that metrics and early stopping look at.
        heads: existing heads to continue from.
        extension: what else is done to the model, for instance quantization.
        progress: called with (stage, steps done, steps in all).
        report: called with the trained model, adapters merged and quantizers in place, the directory that becomes the output, and
            the history; by the first process only.

    Returns:
        what was done; ``base_change`` is known to the first process only.

    Raises:
        MedusaExportError: bad input, a loss that is not finite, a base that did not move, or leftovers of another training.
    """
    arguments.check()
    check_examples(dataset, "training data")
    if held_out:
        check_examples(held_out, "held-out data")
    if arguments.patience and not held_out:
        raise ConfigError("patience", str(arguments.patience), "0 without held-out data", "hold some data back")
    is_first = int(os.environ.get("RANK", "0")) == 0
    beside = training_work(output) if is_first else nullcontext(work_beside(output))
    with beside as work:
        run = _Run(model_dir, dataset, held_out, output, arguments, work, progress)
        if is_first:
            run.claim(heads, extension)
        return run.train(heads, extension, report)


@dataclass(frozen=True)
class _Run:
    model_dir: Path
    dataset: Sequence[Example]
    held_out: Sequence[Example]
    output: Path
    arguments: ReferenceArguments
    work: Path
    progress: Progress

    def claim(self, heads: Path | None, extension: Extension | None) -> None:
        """Refuse the work directory of another training."""
        wanted = {
            "arguments": self.arguments.recorded(),
            "extension": None if extension is None else extension.recorded(),
            "model": str(self.model_dir.resolve()),
            "heads": None if heads is None else str(heads.resolve()),
            "data": [data_hash(self.dataset), data_hash(self.held_out)],
        }
        text = json.dumps(wanted, sort_keys=True)
        record = self.work / "run.json"
        if record.exists() and record.read_text(encoding="utf-8") != text:
            raise OutputError(
                str(self.work), "a training with other arguments or data", "this one's", "delete it, or train elsewhere"
            )
        record.write_text(text, encoding="utf-8")

    def train(self, heads: Path | None, extension: Extension | None, report: Report) -> ReferenceReport:
        options = training_arguments(self.arguments, self.work, steps=1, seed=self.arguments.seed, evaluates=False)
        if options.fsdp and extension is not None:
            raise ConfigError("fsdp", "shards of weights, which have no scale", "whole ones", "train without fsdp")

        def made() -> Built:
            return build(self.model_dir, self.arguments, heads=heads, extension=extension, device=options.device)

        built, planned = made(), stages(self.arguments, len(self.dataset), options.world_size)
        found: dict[str, float] = {}
        history: History = {}
        for stage in planned:
            found, history[stage.name] = self._stage(stage, built, is_last=stage is planned[-1])
            if options.fsdp:  # what it has sharded stays so
                built = made()
                load_trained(built.module(self.arguments, freeze_base=stage.freeze_base), self._finished(stage))
        change = 0.0
        if options.process_index == 0:
            change = self._write(built, extension, planned, lambda model, out: report(model, out, history))
        return ReferenceReport(planned, found, change, history)

    def _stage(self, stage: Stage, built: Built, *, is_last: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Train one stage, or take what an earlier run made of it; returns the metrics after the last one, and its history."""
        directory, finished = self.work / stage.name, self._finished(stage)
        module = built.module(self.arguments, freeze_base=stage.freeze_base)
        trainer = self._trainer(stage, module, directory, evaluates=is_last and bool(self.held_out))
        checkpoint = last_checkpoint(directory)
        if finished.exists():
            load_trained(module, finished)
        else:
            if checkpoint is not None:
                logger.info("continuing from %s", checkpoint)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            if trainer.is_world_process_zero():
                trainer.state.save_to_json(str(self.work / f"{stage.name}.json"))
            trainer.save_trained(finished)
        found = _without_prefix(trainer.evaluate()) if trainer.eval_dataset is not None else {}
        return found, _history(self.work / f"{stage.name}.json")

    def _finished(self, stage: Stage) -> Path:
        return self.work / f"{stage.name}.safetensors"

    def _trainer(self, stage: Stage, module: MedusaTraining, directory: Path, *, evaluates: bool) -> MedusaTrainer:
        seed = self.arguments.seed + (
            0 if stage.freeze_base else 1
        )  # or both stages would begin with the same examples
        stops_early = evaluates and self.arguments.patience > 0
        return MedusaTrainer(
            module,
            self.arguments,
            progress=lambda done, total: self.progress(stage.name, done, total),
            args=training_arguments(self.arguments, directory, steps=stage.steps, seed=seed, evaluates=evaluates),
            train_dataset=self.dataset,
            eval_dataset=self.held_out if evaluates else None,
            callbacks=[EarlyStoppingCallback(self.arguments.patience)] if stops_early else [],
        )

    def _write(
        self,
        built: Built,
        extension: Extension | None,
        planned: Sequence[Stage],
        report: Callable[[Any, Path], None],
    ) -> float:
        """The output, and TensorBoard's files of every stage beside it."""
        built.merge()
        files = self.work / "files"
        shutil.rmtree(files, ignore_errors=True)
        files.mkdir()
        report(built.model, files)
        if extension is not None:
            extension.finish(built.model, files)
        change = write_output(built.model, self.model_dir, files, self.arguments)
        for stage in planned:
            if (self.work / stage.name / "runs").is_dir():
                shutil.copytree(self.work / stage.name / "runs", files / LOGS / stage.name)
        publish(files, self.output)
        shutil.rmtree(self.work)
        return change


def last_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that was written to its end: its state is the last of its files."""
    found = []
    for path in directory.glob("checkpoint-*"):
        try:
            found.append((int(json.loads((path / STATE).read_text(encoding="utf-8"))["global_step"]), path))
        except (OSError, ValueError, KeyError):
            logger.warning("%s: cut off while it was written; not used", path)
    return max(found)[1] if found else None


def _history(path: Path) -> list[dict[str, Any]]:
    """What a stage logged; only the first process has written it for certain."""
    if not path.exists():
        return []
    logged: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    return logged


def _without_prefix(found: dict[str, float]) -> dict[str, float]:
    names = [name for name in found if name.startswith(("eval_base", "eval_head", "eval_loss"))]
    return {name.removeprefix("eval_"): found[name] for name in names}
