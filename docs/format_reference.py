"""Writes docs/formats.md from the rows of the formats: ``python docs/format_reference.py``. A test says when it is out of date."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from medusa_export.quantize.format_facts import NotOffered
from medusa_export.quantize.formats import FORMATS, KV_CACHE, Format
from medusa_export.quantize.stored_parts import Part

DOCS = Path(__file__).resolve().parent
HEAD = """# Formats

`--quant` chooses how weights are stored and multiplied, `--kv-cache` how keys and values are stored. `docs/format_reference.py`
writes this page from the table that the export itself works from; `medusa-export formats` prints it in short.

    medusa-export formats
    medusa-export plan --ckpt model --heads heads --quant fp8

The second prints the exact sizes of an export, and the GPUs that its engine fits on.

## Which one

- **A GPU of the Ada, Hopper or Blackwell generation:** `fp8`. It is nearly as accurate as 16 bit, and halves the weights.
- **An older GPU (Ampere):** `int8_wo` where accuracy counts, `int4_awq` where memory does, `int8_sq` where many sequences are
  decoded at once.
- **A CPU:** `int8_wo` is the fastest. `none` and `fp8` give the same text with and without Medusa to the last token; with
  `int8_wo`, two nearly tied tokens can change places ([measured](performance.md#how-exact-a-step-is)).
- **Whatever you choose:** `medusa-run --reference model` says what it costs on your prompts. Too much? [Train with it](qat.md).

## At a glance

- *bits a weight*: in TensorRT-LLM's engine, the scales of groups included; scales a tensor or a row add less than 0.1.
- *GPUs*: compute capabilities (SM) that TensorRT-LLM's engine runs on.
- *CPU*: whether there is an engine for ONNX Runtime; otherwise export with `--engine none`.
- *prompts*: whether the export has to run some through the model, to calibrate scales.
- *KL* and *same token*: of TensorRT's float16 graphs against the unquantized SmolLM2-135M-Instruct, a model so small that it
  forgives little ([how it was measured](tensorrt.md#numbers)). `int8_sq` was measured there with SmoothQuant's alpha of 1;
  exports take 0.75, which [costs less](performance.md#int8-products).

"""
STORED = """
## What is stored

*out* and *in* are the sizes of a linear on one rank, *group* the inputs that share a scale. In every format, norms, embeddings
and the vocabulary projection of a checkpoint stay in 16 bit, and so do the heads without `--quant-heads`.
"""
Row = Iterable[str]


class Size(str):
    """A size by its name, where the rows compute with numbers."""

    __slots__ = ()

    def __floordiv__(self, other: object) -> Size:
        return Size(f"{self}/{other}")


def page() -> str:
    """The page."""
    head = ["`--quant`", "what", "bits a weight", "GPUs", "CPU", "prompts", "KL, nats", "same token"]
    lines = [HEAD + _table(head, _glance()).rstrip()]
    lines += [STORED, *(line for form in FORMATS.values() for line in _section(form)), *_caches()]
    return "\n".join(lines).rstrip() + "\n"


def _glance() -> Iterator[Row]:
    loss = measured_loss()
    for form in FORMATS.values():
        kl, same = loss.get(form.name, ("not measured", "not measured"))
        cpu, prompts = ("yes" if yes else "no" for yes in (form.onnxruntime, form.needs_calibration))
        name = f"[`{form.name}`](#{form.name})"
        yield name, form.description, f"{engine_bits(form):g}", _gpus(form.trtllm), cpu, prompts, kl, same


def measured_loss() -> dict[str, tuple[str, str]]:
    """KL and agreement with the unquantized checkpoint, by format, out of the table in tensorrt.md."""
    text = (DOCS / "tensorrt.md").read_text(encoding="utf-8").split("## Numbers", 1)[1].split("\n## ", 1)[0]
    lines = [line.strip("|").split("|") for line in text.splitlines() if "| float16 |" in line]
    rows = [map(str.strip, cells) for cells in lines]
    return {name.strip("`"): (kl, same) for name, *_, kl, same in rows}


def engine_bits(form: Format) -> float:
    """Bits of a weight in TensorRT-LLM's engine, its share of a group's scale included."""
    share = form.trtllm.group_scale_bits / form.group_size if form.group_size else 0.0
    return form.trtllm.engine_bits + share


def _section(form: Format) -> Iterator[str]:
    yield f"### {form.name}\n\n{form.description}.\n"
    yield from (f"- {text}" for text in (*_targets(form), *_rules(form)))
    tables: dict[tuple[Part, ...], list[str]] = {}
    for where, target in (("`trtllm/`", form.trtllm), ("`hf/`", form.huggingface)):
        if target and target.parts:
            tables.setdefault(target.parts, []).append(where)
    for parts, places in tables.items():
        yield f"\nA linear in {' and '.join(places)}:\n"
        yield _table(["tensor", "dtype", "shape", "what"], map(part_row, parts)).rstrip()
    yield ""


def _targets(form: Format) -> Iterator[str]:
    """Where it runs, a line for each target."""
    made = f"`quant_algo` {form.trtllm.algo}" if form.trtllm.algo else "no `quant_algo`"
    if form.trtllm.build_bits:
        made += f"; the file has 16-bit weights, and `trtllm-build` rounds them to INT{form.trtllm.build_bits}, one scale a row"
    yield f"TensorRT-LLM: {made}. GPUs: SM {_gpus(form.trtllm)}."
    if isinstance(form.tensorrt, NotOffered):
        yield f"TensorRT and TensorRT-RTX: not made, {form.tensorrt.why}; {form.tensorrt.action}."
    else:
        yield f"TensorRT and TensorRT-RTX: {form.tensorrt.precision}. GPUs: SM {form.tensorrt.min_sm} and newer."
    yield f"ONNX Runtime, on a CPU: {form.onnxruntime.precision if form.onnxruntime else 'not made'}."
    yield f"Hugging Face (`--format hf`): {'made' if form.huggingface else 'not made'}."


def _rules(form: Format) -> Iterator[str]:
    """What it asks for, and what can be chosen."""
    if form.needs_calibration:
        yield f"Calibrated on prompts by ModelOpt's `{form.modelopt_config}`."
    if form.smoothing_alpha is not None:
        yield f"SmoothQuant's alpha is {form.smoothing_alpha:g}: how much of an input's range moves into the weights."
    if form.group_size:
        sizes = " or ".join(map(str, form.group_sizes))
        yield f"{form.group_size} inputs share a scale" + (f"; `--group-size` takes {sizes}." if " " in sizes else ".")
    if form.trtllm.multiple > 1:
        yield f"A linear's inputs and outputs have to be multiples of {form.trtllm.multiple} times the ranks."
    if form.trtllm.rank_tile != (1, 1):
        out, width = form.trtllm.rank_tile
        yield f"On each rank, a linear's outputs have to be a multiple of {out}, its inputs of {width}."
    if form.is_quantized:
        yield f"Heads: {'16 bit, or quantized too with `--quant-heads`' if form.quantizes_heads else '16 bit'}."
        yield f"Single linears in 16 bit (`--exclude`): {'yes' if form.trtllm.excludable else 'no'}."
    if isinstance(form.qat, NotOffered):
        yield f"Training with it (`medusa-train --quant`): no, {form.qat.why}; {form.qat.action}."
    else:
        yield f"Training with it (`medusa-train --quant`): for {' and '.join(form.qat)}."


def part_row(part: Part) -> Row:
    """Name, dtype, shape and meaning of a stored tensor, for the table."""
    sizes: Any = Size("out"), Size("in"), Size("group")  # the rows only divide them
    shape = ", ".join(map(str, part.shape(*sizes)))
    text = part.kind.value.replace("slices", "weights")
    return f"`{part.suffix}`", part.dtype or "16 bit", f"[{shape}]", text


def _caches() -> Iterator[str]:
    yield "## Key/value caches\n"
    rows = (
        (f"`{row.name}`", row.description, row.quant_algo or "-", _gpus(row), "yes" if row.needs_calibration else "no",
         "yes" if row.in_huggingface else "no")
        for row in KV_CACHE.values()
    )  # fmt: skip
    yield _table(["`--kv-cache`", "what", "`kv_cache_quant_algo`", "GPUs", "prompts", "`--format hf`"], rows)
    yield "They go with every weight format, in TensorRT-LLM; engines for ONNX Runtime and TensorRT do not quantize their caches."


def _gpus(row: Any) -> str:
    return f"{row.min_sm} and newer" if row.max_sm is None else f"{row.min_sm} to {row.max_sm}"


def _table(head: Row, rows: Iterable[Row]) -> str:
    cells = [list(head)]
    cells += [["---"] * len(cells[0]), *(list(row) for row in rows)]
    return "".join(f"| {' | '.join(re.sub(r'[|]', '/', cell) for cell in row)} |\n" for row in cells)


if __name__ == "__main__":
    (DOCS / "formats.md").write_text(page(), encoding="utf-8")
