"""medusa-train: parse, call one function, print. Like the other cli files, it may import across."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.cli.console import Verbose, command_app, main, progress_bars, stderr, stdout
from medusa_export.exporter.cli.flags_file import read_flags

if TYPE_CHECKING:
    from medusa_export.heads.training.dataset import Example

train_app = command_app()

# flag -> field of the arguments, by way of training. A flag that a way does not have is refused there.
_SHARED = {
    name: name for name in ("epochs", "max_steps", "weight_decay", "bf16", "patience", "seed", "checkpoint_every")
}
_FAST = _SHARED | {"lr": "lr", "batch_tokens": "batch_rows", "distill": "distill", "loss_vocab": "vocab"}
_REFERENCE = _SHARED | {
    "lr": "learning_rate", "layout": "layout", "num_heads": "heads", "num_layers": "layers",
    "batch_size": "batch_size", "accumulate": "accumulate", "gradient_checkpointing": "gradient_checkpointing",
}  # fmt: skip
_JOINT = _REFERENCE | {
    "lora_rank": "lora_rank", "warmup_heads": "warmup_heads", "heads_weight": "heads_weight",
    "head_lr_factor": "head_lr_factor", "ramp": "ramp", "hold_base": "distill",
}  # fmt: skip
_ELSEWHERE = {"cache": "the default way", "fsdp": "--reference or --joint",
              "group_size": "--quant", "target": "--quant"}  # fmt: skip
_FSDP = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2}}


@train_app.command()
def train_command(
    ckpt: Annotated[Path, typer.Option(help="Hugging Face directory of the base model.")],
    data: Annotated[list[Path], typer.Option(help="JSONL that medusa-data wrote. May be given again.")],
    output: Annotated[Path, typer.Option(help="Directory to write: medusa-export takes it as --heads.")],
    heads: Annotated[Path | None, typer.Option(help="Existing heads to start from.")] = None,
    num_heads: Annotated[int, typer.Option(help="Medusa heads.")] = 4,
    num_layers: Annotated[int, typer.Option(help="Residual blocks of each head.")] = 1,
    layout: Annotated[
        str, typer.Option(help="v2: heads share lm_head; v1: each has its own; modelopt: one checkpoint with the base.")
    ] = "v2",
    joint: Annotated[
        bool, typer.Option("--joint/--only-medusa-heads", help="Train the base model too (Medusa-2).")
    ] = False,
    reference: Annotated[
        bool, typer.Option("--reference", help="Train heads alone with ModelOpt and the Trainer, without the cache.")
    ] = False,
    quant: Annotated[
        str | None, typer.Option(help="Train for a base that is quantized so, with ModelOpt's quantizers in place.")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="With --quant: inputs that share a scale.")] = None,
    target: Annotated[str | None, typer.Option(help="With --quant: trtllm or onnx, who rounds in the end.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data. Default: 3; 1 with the base.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps; wins over --epochs.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate: of the heads, or with --joint of the base.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Positions a step. Default: 1024.")] = None,
    distill: Annotated[
        float | None, typer.Option(help="Share of the loss that is the base model's own distribution. Default: 0.")
    ] = None,
    loss_vocab: Annotated[
        int | None, typer.Option(help="Take the loss over so many frequent tokens, which is faster. Default: all.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Keep hidden states here, for other trainings with the same data.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Conversations of a micro-batch. Default: 8.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Micro-batches of a step. Default: 1.")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = None,
    fsdp: Annotated[bool | None, typer.Option("--fsdp", help="Shard the model over the GPUs of torchrun.")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Of the base's adapters; 0: all weights. Default: 16.")] = None,
    head_lr_factor: Annotated[float | None, typer.Option(help="Heads' rate, in base rates. Default: 4.")] = None,
    warmup_heads: Annotated[
        float | None, typer.Option(help="Share of the steps in which heads learn alone. Default: 0.2.")
    ] = None,
    heads_weight: Annotated[float | None, typer.Option(help="Of the heads in the joint loss. Default: 0.2.")] = None,
    ramp: Annotated[str | None, typer.Option(help="How that weight is reached: constant, linear or sine.")] = None,
    hold_base: Annotated[
        bool | None,
        typer.Option("--hold-base/--no-hold-base", help="Hold the base to its own predictions, or to the text."),
    ] = None,
    held_out: Annotated[float, typer.Option(help="Share of the conversations that is measured on.")] = 0.05,
    eval_data: Annotated[Path | None, typer.Option(help="Measure on these conversations instead.")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Cut conversations to so many tokens. Default: the model's, up to 2048.")
    ] = None,
    keep_truncated: Annotated[
        bool, typer.Option("--keep-truncated", help="Learn from answers that were cut off too.")
    ] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16.")] = False,
    patience: Annotated[
        int | None, typer.Option(help="End after so many evaluations without better accuracy. Default: never.")
    ] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints. Default: 200.")] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the data.")] = 0,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML with flags, such as num-heads: 2; flags win.", callback=read_flags, is_eager=True),
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Train Medusa heads on conversations that the base model wrote. Run it again to continue after an interruption.

    Hidden states of the frozen base are computed once and cached. --joint and --quant need the whole model in every
    step; start them with torchrun to use several GPUs.

    Example: [bold]medusa-train --ckpt model --data data.jsonl --output heads[/]
    """
    given = dict(locals())
    way = _way(given)
    dataset, measured = _examples(given)
    with progress_bars() as given["progress"]:
        found = way(given, dataset, measured)
    if found is not None:
        _print_accuracy(found)
        stdout.print(f"wrote {output}", soft_wrap=True, markup=False)


def _way(given: Mapping[str, Any]) -> Any:
    """The function that trains, once the flags are known to fit it."""
    uses_model = given["joint"] or given["reference"] or given["quant"] is not None
    fields = _JOINT if given["joint"] else _REFERENCE if uses_model else _FAST
    needed = dict.fromkeys(_JOINT.keys() - _REFERENCE.keys(), "--joint")
    needed |= dict.fromkeys(_REFERENCE.keys() - _FAST.keys(), "--reference or --joint")
    needed |= dict.fromkeys(_FAST.keys() - _JOINT.keys(), "the default way") | _ELSEWHERE
    allowed = {
        *fields,
        *(("fsdp",) if uses_model else ("cache",)),
        *(("group_size", "target") if given["quant"] else ()),
    }
    always = {"layout", "num_heads", "num_layers"}
    for name, condition in needed.items():
        if given[name] is not None and name not in allowed | always:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(flag, f"{given[name]}", f"it only with {condition}", "leave it out")
    if not uses_model and given["layout"] not in ("v1", "v2"):
        raise ConfigError("--layout", given["layout"], "v1, v2, or modelopt with --reference or --joint", "choose one")
    if not uses_model and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        expected = "one; several with --reference or --joint"
        raise ConfigError("processes", os.environ["WORLD_SIZE"], expected, "run it without torchrun")
    return _train_with_model if uses_model else _train_fast


def _fields(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {field: given[flag] for flag, field in names.items() if given[flag] is not None}


def _examples(given: Mapping[str, Any]) -> tuple[Sequence[Example], Sequence[Example]]:
    """Conversations to train on and to measure on."""
    from medusa_export.core.text.tokenizer import read_tokenizer
    from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
    from medusa_export.heads.training.dataset import load_examples, read_rows, split

    if not 0 < given["held_out"] < 1:
        raise ConfigError("--held-out", f"{given['held_out']}", "a share above 0 and below 1", "change it")
    config = DecoderConfig.from_dir(given["ckpt"])
    longest = config.max_position_embeddings
    max_length = min(2048, longest) if given["max_length"] is None else given["max_length"]
    if not 2 <= max_length <= longest:
        raise ConfigError("--max-length", f"{max_length}", f"2 .. {longest}, the model's positions", "change it")
    tokenizer = read_tokenizer(given["ckpt"])

    def load(paths: Sequence[Path]) -> list[Example]:
        return load_examples(
            read_rows(paths), tokenizer, eos=config.eos_token_ids, max_length=max_length,
            vocab_size=config.vocab_size, keep_truncated=given["keep_truncated"],
        )  # fmt: skip

    if given["eval_data"] is not None:
        return load(given["data"]), load([given["eval_data"]])
    return split(load(given["data"]), given["held_out"])


def _train_fast(given: Mapping[str, Any], dataset: Sequence[Example], held_out: Sequence[Example]) -> Any:
    from medusa_export.heads.training.cached.run import HeadShape, train_fast
    from medusa_export.heads.training.cached.trainer import TrainArguments

    return train_fast(
        given["ckpt"], dataset, held_out, given["output"], TrainArguments(**_fields(given, _FAST)),
        HeadShape(given["num_heads"], given["num_layers"], given["layout"] == "v1"),
        heads=given["heads"], cache=given["cache"], progress=given["progress"],
        say=lambda text: stderr.print(text, soft_wrap=True, markup=False),
    )  # fmt: skip


def _train_with_model(given: Mapping[str, Any], dataset: Sequence[Example], held_out: Sequence[Example]) -> Any:
    """Through the Trainer; None in processes other than the first."""
    from medusa_export.heads.training.full.arguments import ReferenceArguments
    from medusa_export.heads.training.full.report import ReferenceReporter
    from medusa_export.heads.training.full.run import train_reference
    from medusa_export.quantize.qat import QatArguments, train_qat

    fields = _fields(given, _JOINT if given["joint"] else _REFERENCE)
    if not given["joint"] and given["lr"] is not None:  # it is the heads' then
        fields["head_lr_factor"] = 1.0
    trainer = _FSDP if given["fsdp"] else {}
    arguments = ReferenceArguments(base="joint" if given["joint"] else "frozen", trainer=trainer, **fields)
    reporter = ReferenceReporter(dataset, held_out, arguments.recorded())
    options = {"held_out": held_out, "heads": given["heads"], "progress": given["progress"], "report": reporter}
    if given["quant"] is None:
        train_reference(given["ckpt"], dataset, given["output"], arguments, **options)
    else:
        quantization = QatArguments(given["quant"], given["group_size"], given["target"] or "trtllm")
        train_qat(given["ckpt"], dataset, given["output"], arguments, quantization, **options)
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
