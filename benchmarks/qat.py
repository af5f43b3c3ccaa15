"""What quantization-aware training gives back of what rounding after the training loses.

    python benchmarks/qat.py --ckpt model --heads heads --data data.jsonl --held-out other.jsonl

Four rows, all on the same held-out answers, which the unquantized base should have written: the base in 16 bit; rounded without
training; rounded after training with ``quantize.qat`` (LoRA adapters on the base, held to the unquantized base's own predictions, and
merged), once with the heads that were trained along and once with the heads as they were. The trained rows measure the stored
directory: it is opened anew and its weights are rounded as the deployed engine rounds them.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers.trainer_utils import EvalPrediction

from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.measure.machine import hardware, versions
from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
from medusa_export.heads.checkpoint.head_layouts import HEAD_FILES
from medusa_export.heads.checkpoint.medusa_checkpoint import MedusaCheckpoint
from medusa_export.heads.training.dataset import Example, load_examples, read_rows
from medusa_export.heads.training.full.arguments import ReferenceArguments
from medusa_export.heads.training.full.model import Collator, build
from medusa_export.heads.training.full.trainer import metrics
from medusa_export.quantize.qat import QatArguments, Quantizers, train_qat

CALIBRATION_TEXTS = 8
FULL, ROUNDED, TRAINED, OLD_HEADS = "16 bit", "rounded", "trained", "trained, heads as before"
RECOVERED = ("perplexity", "head0_top1", "heads_top1")


def read_examples(ckpt: Path, data: Path, *, max_length: int, min_answer: int = 2) -> list[Example]:
    """Conversations cut to ``max_length`` tokens, those with at least ``min_answer`` tokens of answers left."""
    config = DecoderConfig.from_dir(ckpt)
    found = load_examples(
        read_rows([data]), read_tokenizer(ckpt), eos=config.eos_token_ids, max_length=max_length,
        vocab_size=config.vocab_size, keep_truncated=True,
    )  # fmt: skip
    return [example for example in found if sum(example.answer_mask) >= min_answer]


def measure(
    ckpt: Path,
    heads: Path,
    held_out: Sequence[Example],
    shape: ReferenceArguments,
    quantization: QatArguments | None,
    texts: Sequence[Sequence[int]],
) -> dict[str, float]:
    """Perplexity of the base and top-1 accuracy of base and heads.

    Args:
        shape: numbers of heads and layers, and the batch size.
        quantization: how weights are rounded; None: not at all.
        texts: to calibrate with.
    """
    extension = None
    if quantization is not None:
        extension = Quantizers(*quantization.check(), texts, ckpt, trains_base=False)
    module = build(ckpt, shape, heads=heads, extension=extension).module(shape, freeze_base=True).eval()
    outputs = []
    with torch.no_grad():
        for start in range(0, len(held_out), shape.batch_size):
            outputs.append(module(**Collator()(held_out[start : start + shape.batch_size])))
    parts, drift = (torch.cat([output[name] for output in outputs]).numpy() for name in ("parts", "drift"))
    found = metrics(EvalPrediction((parts, drift), None))  # type: ignore[arg-type]
    top1 = {name: value for name, value in found.items() if name.endswith("_top1")}
    of_heads = [value for name, value in top1.items() if name.startswith("head")]
    return {"perplexity": math.exp(found["base_nll"]), **top1, "heads_top1": sum(of_heads) / len(of_heads)}


def recovered(rows: Mapping[str, Mapping[str, float]], name: str) -> dict[str, float]:
    """Share of the loss by rounding that a row does not have; above 1: better than the base in 16 bit; NaN: no loss."""
    full, rounded = rows[FULL], rows[ROUNDED]
    lost = {key: full[key] - rounded[key] for key in RECOVERED}
    return {key: (rows[name][key] - rounded[key]) / loss if loss else math.nan for key, loss in lost.items()}


def _print(rows: Mapping[str, Mapping[str, float]], title: str) -> None:
    table = Table(
        "base", "perplexity", "base top 1", "head 0 top 1", "mean of heads", *("given back",) * 3, title=title
    )
    for name, row in rows.items():
        shares = recovered(rows, name).values() if name in (TRAINED, OLD_HEADS) else ()
        accuracy = (f"{row[key]:.2%}" for key in ("base_top1", "head0_top1", "heads_top1"))
        table.add_row(name, f"{row['perplexity']:.3f}", *accuracy, *(f"{share:.0%}" for share in shares))
    console = Console()
    console.print(table)
    console.print(f"given back: share of the loss in {', '.join(RECOVERED)}")


def main(
    ckpt: Annotated[Path, typer.Option(help="Hugging Face directory of the base model.")],
    heads: Annotated[Path, typer.Option(help="Heads of layout v2.")],
    data: Annotated[Path, typer.Option(help="Conversations to train on.")],
    held_out: Annotated[Path, typer.Option(help="Conversations to measure on, answered by the base in 16 bit.")],
    quant: str = "int4_wo",
    target: str = "trtllm",
    steps: int = 50,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    lora_rank: int = 16,
    max_length: Annotated[int, typer.Option(help="Tokens of a conversation.")] = 128,
    min_answer: Annotated[int, typer.Option(help="Tokens of an answer that is trained on.")] = 48,
    measured: Annotated[int, typer.Option(help="Held-out conversations.")] = 48,
    work: Annotated[Path | None, typer.Option(help="Where the temporary folder goes. Default: the system's.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Print perplexity and accuracy without rounding, with it, and with training for it."""
    stored = MedusaCheckpoint.open(ckpt, heads)
    shape = ReferenceArguments(
        heads=stored.num_medusa_heads, layers=stored.num_medusa_layers, batch_size=batch_size, report_to=()
    )
    arguments = ReferenceArguments(
        base="joint", heads=shape.heads, layers=shape.layers, batch_size=batch_size, max_steps=steps, warmup_heads=0.0,
        learning_rate=learning_rate, head_lr_factor=1.0, lora_rank=lora_rank, bf16=True, log_every=5, report_to=(),
    )  # fmt: skip
    quantization = QatArguments(quant, target=target)
    dataset = read_examples(ckpt, data, max_length=max_length, min_answer=min_answer)[: steps * batch_size]
    answers = read_examples(ckpt, held_out, max_length=max_length)[:measured]
    texts = [example.input_ids for example in dataset[:CALIBRATION_TEXTS]]

    def row(directory: Path, its_heads: Path, rounding: QatArguments | None) -> dict[str, float]:
        return measure(directory, its_heads, answers, shape, rounding, texts)

    rows = {FULL: row(ckpt, heads, None), ROUNDED: row(ckpt, heads, quantization)}
    with tempfile.TemporaryDirectory(prefix="qat-", dir=work) as folder:
        out = Path(folder) / "out"
        started = time.monotonic()
        report = train_qat(ckpt, dataset, out, arguments, quantization, batches=texts, heads=heads)
        seconds = time.monotonic() - started
        rows[TRAINED] = row(out, out / HEAD_FILES[0], quantization)
        rows[OLD_HEADS] = row(out, heads, quantization)
    scored = sum(sum(example.answer_mask) for example in answers)
    _print(rows, f"{quant} for {target}: {steps} steps of {batch_size} in {seconds:.0f} s, {scored} held-out tokens")
    if json_file:
        body = {
            "rows": rows, "recovered": {name: recovered(rows, name) for name in (TRAINED, OLD_HEADS)},
            "seconds": seconds, "examples": len(dataset), "held_out": len(answers), "held_out_tokens": scored,
            "arguments": arguments.recorded(), "quant": quant, "target": target, "base_change": report.base_change,
            "losses": [[entry["step"], entry["loss"]] for entry in report.history["joint"] if "loss" in entry],
            "hardware": hardware(), "versions": versions(),
        }  # fmt: skip
        json_file.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
