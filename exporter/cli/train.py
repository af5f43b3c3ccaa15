"""medusa-train: parse, call one function, print."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from medusa_export.core.errors import ConfigError, require_packages
from medusa_export.core.flags import NUMBER, Bounds, flag
from medusa_export.core.hub import HEADS, REVISION_HELP, find_model
from medusa_export.core.text.tokenizer import CHAT_TEMPLATE_HELP
from medusa_export.exporter.cli.console import command_app, main, progress_bars, stderr, stdout
from medusa_export.exporter.cli.flags.commands import Given, command
from medusa_export.heads.training.arguments import RUN
from medusa_export.heads.training.cached.arguments import DEFAULT_WAY, HeadShape, TrainArguments
from medusa_export.heads.training.full.arguments import DEFAULT_LAYOUT, JOINT, LAYOUTS, WITH_MODEL, ReferenceArguments
from medusa_export.quantize.qat_flags import QatFlags

if TYPE_CHECKING:
    from medusa_export.heads.training.dataset import Example

train_app = command_app()

INPUT, OUTPUT, WAY = "Input", "Output", "Way of training"  # headings of --help
_FSDP = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2}}


@dataclass(frozen=True)
class TrainFlags:
    """What medusa-train takes for every way of training."""

    ckpt: Path = flag(help="Base model: a Hugging Face directory, or owner/name on the hub.", panel=INPUT)
    data: tuple[Path, ...] = flag(help="JSONL that medusa-data wrote. Can be repeated.", panel=INPUT)
    output: Path = flag(help="Directory to write: medusa-export takes it as --heads.", panel=OUTPUT)
    heads: Path | None = flag(None, help="Existing heads to start from: a path, or owner/name on the hub.", panel=INPUT)
    revision: str | None = flag(None, help=REVISION_HELP, panel=INPUT)
    chat_template: Path | None = flag(None, help=CHAT_TEMPLATE_HELP, panel=INPUT)
    joint: bool = flag(False, help="Train the base model too (Medusa-2).", panel=WAY, opposite="--only-medusa-heads")
    reference: bool = flag(False, help="Train heads alone with ModelOpt and the Trainer, without the cache.", panel=WAY)
    held_out: float = flag(
        0.05, help="Share of the conversations to measure on.", panel=INPUT, bounds=Bounds(above=0, below=1)
    )
    eval_data: Path | None = flag(None, help="Measure on these conversations instead.", panel=INPUT)
    max_length: int | None = flag(
        None,
        help="Cut conversations to N tokens.",
        panel=INPUT,
        metavar="N",
        default="the model's, up to 2048",
        bounds=NUMBER,
    )
    keep_truncated: bool = flag(False, help="Also learn from answers that were cut off.", panel=INPUT)
    learn_prompts: bool = flag(False, help="Also learn from the text of the prompts.", panel=INPUT)


@dataclass(frozen=True)
class CacheFlags:
    """What the default way takes besides."""

    cache: Path | None = flag(
        None, help="Keep hidden states here, for other trainings with the same data.", panel=RUN, requires=DEFAULT_WAY
    )


@dataclass(frozen=True)
class DeviceFlags:
    """What the ways with the whole model take besides."""

    fsdp: bool = flag(False, help="Shard the model over the GPUs of torchrun.", panel=RUN, requires=WITH_MODEL)


EITHER = (HeadShape, TrainArguments, CacheFlags, ReferenceArguments, DeviceFlags, QatFlags)


@dataclass(frozen=True)
class TrainingRequest:
    """A training: what was asked for, the conversations, and where to show how far it is."""

    own: TrainFlags
    given: Given
    dataset: Sequence[Example]
    held_out: Sequence[Example]
    progress: Callable[[str, int, int], None]


@command(train_app, either=EITHER)
def train_command(own: TrainFlags, given: Given) -> None:
    """Train Medusa heads on conversations that the base model wrote. Run it again to continue after an interruption.

    Hidden states of the frozen base are computed once and cached. --joint and --quant need the whole model in every
    step; start them with torchrun to use several GPUs.

    Example: medusa-train --ckpt model --data data.jsonl --output heads
    """
    way = _way(own, given)
    own, given = _on_this_machine(own, given)
    dataset, measured = _examples(own)
    with progress_bars() as progress:
        found = way(TrainingRequest(own, given, dataset, measured, progress))
    if found is not None:
        _print_accuracy(found)
        stdout.print(f"wrote {own.output}", soft_wrap=True)


def _way(own: TrainFlags, given: Given) -> Callable[[TrainingRequest], Any]:
    """The function that trains, once the flags are known to fit it."""
    uses_model = own.joint or own.reference or "quant" in given
    holding = {JOINT: own.joint, "--quant": "quant" in given, WITH_MODEL: uses_model, DEFAULT_WAY: not uses_model}
    given.require(EITHER, holding)
    layout = given.get("layout", DEFAULT_LAYOUT)
    if not uses_model and LAYOUTS[layout].holds_base:
        raise ConfigError("--layout", layout, f"v1 or v2; {layout} with {WITH_MODEL}", "choose one")
    if not uses_model and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "processes", os.environ["WORLD_SIZE"], f"one; several with {WITH_MODEL}", "run it without torchrun"
        )
    return _train_with_model if uses_model else _train_fast


def _on_this_machine(own: TrainFlags, given: Given) -> tuple[TrainFlags, Given]:
    """The flags with local paths and the heads' shape, after every refusal that takes no work."""
    from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
    from medusa_export.heads.training.start import head_shape
    from medusa_export.heads.training.workdir import require_free

    uses_model = own.joint or own.reference or "quant" in given
    require_packages("matplotlib", "tensorboard", *(("modelopt",) if uses_model else ()), extra="train")
    require_free(own.output)
    ckpt = find_model(own.ckpt, revision=own.revision, check=DecoderConfig.from_dir).path
    heads = None if own.heads is None else find_model(own.heads, wanted=HEADS).path
    num_heads, num_layers = head_shape(
        ckpt, heads, num_heads=given.get("num_heads"), num_layers=given.get("num_layers"),
        own_lm_head=LAYOUTS[given.get("layout", DEFAULT_LAYOUT)].holds_own, takes_more=not uses_model,
    )  # fmt: skip
    return replace(own, ckpt=ckpt, heads=heads), Given(given | {"num_heads": num_heads, "num_layers": num_layers})


def _examples(own: TrainFlags) -> tuple[Sequence[Example], Sequence[Example]]:
    """Conversations to train on and to measure on."""
    from medusa_export.core.text.model_tokens import ModelTokens
    from medusa_export.core.text.tokenizer import read_tokenizer
    from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
    from medusa_export.heads.training.dataset import load_examples, read_rows, split, with_prompts

    config = DecoderConfig.from_dir(own.ckpt)
    longest = config.max_position_embeddings
    max_length = min(2048, longest) if own.max_length is None else own.max_length
    if not 2 <= max_length <= longest:
        raise ConfigError("--max-length", f"{max_length}", f"2 .. {longest}, the model's positions", "change it")
    tokenizer = read_tokenizer(own.ckpt, own.chat_template)
    tokens = ModelTokens.of(tokenizer, config.eos_token_ids, vocab_size=config.vocab_size)

    def load(paths: Sequence[Path]) -> list[Example]:
        return load_examples(
            read_rows(paths), tokenizer, eos=tokens.ends, max_length=max_length,
            vocab_size=config.vocab_size, keep_truncated=own.keep_truncated,
        )  # fmt: skip

    if own.eval_data is not None:
        dataset, held_out = load(own.data), load([own.eval_data])
    else:
        dataset, held_out = split(load(own.data), own.held_out)
    return with_prompts(dataset) if own.learn_prompts else dataset, held_out


def _train_fast(asked: TrainingRequest) -> Any:
    from medusa_export.heads.training.cached.run import train_fast

    own, given = asked.own, asked.given
    shape = given.build(HeadShape, own_lm_head=LAYOUTS[given.get("layout", DEFAULT_LAYOUT)].holds_own)
    return train_fast(
        own.ckpt, asked.dataset, asked.held_out, own.output, given.build(TrainArguments), shape,
        heads=own.heads, cache=given.build(CacheFlags).cache, progress=asked.progress,
        say=lambda text: stderr.print(text, soft_wrap=True),
    )  # fmt: skip


def _train_with_model(asked: TrainingRequest) -> Any:
    """Through the Trainer; None in processes other than the first."""
    from medusa_export.heads.training.full.report import ReferenceReporter
    from medusa_export.heads.training.full.run import train_reference
    from medusa_export.quantize.qat import QatArguments, train_qat

    own, given = asked.own, asked.given
    more: dict[str, Any] = {"base": "joint" if own.joint else "frozen", "trainer": _FSDP if "fsdp" in given else {}}
    if not own.joint and "lr" in given:  # it is the heads' then
        more["head_lr_factor"] = 1.0
    arguments = given.build(ReferenceArguments, **more)
    reporter = ReferenceReporter(asked.dataset, asked.held_out, arguments.recorded())
    options: dict[str, Any] = {
        "held_out": asked.held_out, "heads": own.heads, "progress": asked.progress, "report": reporter
    }  # fmt: skip
    if "quant" in given:
        train_qat(own.ckpt, asked.dataset, own.output, arguments, given.build(QatArguments), **options)
    else:
        train_reference(own.ckpt, asked.dataset, own.output, arguments, **options)
    return reporter.found


def _print_accuracy(found: Mapping[str, Any]) -> None:
    from medusa_export.heads.training.report import SHOWN

    table = Table(title=f"Held-out accuracy, {found['positions']} positions")
    for name in ("head", "predicts", *(f"top {k}" for k in SHOWN)):
        table.add_column(name, justify="right")
    for number, accuracy in enumerate(found["heads"]):
        shares = (f"{accuracy[f'top{k}']:.1%}" for k in SHOWN)
        table.add_row(str(number), f"t+{number + 2}", *shares)
    stdout.print(table)
    tree = found["tree"]
    nodes = len(tree["choices"])
    stdout.print(f"tokens per step with the best tree of {nodes} draft nodes: {tree['tokens_per_step']:.2f}")


def train_main() -> None:
    """Entry point of medusa-train."""
    main(train_app)
