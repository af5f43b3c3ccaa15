"""What an export will take, from config.json and tensor headers alone: files, disk, RAM here, and memory of GPUs."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medusa_export.core.artifacts.manifest import MANIFEST, _refuse_occupied, is_up_to_date, read_manifest, require_idle
from medusa_export.core.errors import ConfigError, OutputError
from medusa_export.core.regular_files import TOKENIZER_FILES
from medusa_export.exporter.engine_dirs.onnxruntime import onnx_form
from medusa_export.exporter.job.job import ExportArguments, Job
from medusa_export.exporter.onnx.builder import ALIGNMENT, INLINE_BYTES
from medusa_export.exporter.onnx.linear import BLOCKS, SMALL_BLOCKS, is_one_product
from medusa_export.exporter.pipeline.export import SMALL_MODEL
from medusa_export.exporter.plan.spec import ExportSpec
from medusa_export.exporter.plan.trtllm_config import trtllm_config
from medusa_export.exporter.plan.trtllm_layout import TensorPlan, plan_ranks
from medusa_export.exporter.sizing.gpus import (
    GPUS,
    MAX_BATCH,
    Fit,
    RankMemory,
    built_bits,
    engine_bytes,
    fit,
    rank_memory,
)
from medusa_export.exporter.sizing.portable import portable_decoder_bytes, portable_heads_bytes
from medusa_export.exporter.write.safetensors import SafetensorsWriter
from medusa_export.heads.checkpoint import families
from medusa_export.quantize.calibration_data import DEFAULT_MAX_LENGTH
from medusa_export.quantize.tensorrt_targets import tensorrt_form

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT = 4096  # tokens, where the model has as many
# Measured, see docs/performance.md, "Memory of the export": no writer and no check took more than 10 times the largest
# tensor in 16 bit, whatever the number of layers. LIBRARIES is RssAnon after the imports, with CPython 3.11 on Linux.
STREAMED, ENGINE_TENSORS, LIBRARIES = 300_000_000, 3, 400_000_000  # docs/performance.md
FLOAT32, FLOAT16 = 4, 2  # bytes
ENGINE_CODE, BUILD_COPIES = 30_000_000, 4  # of TensorRT-RTX 1.7: docs/tensorrt.md
UNITS = ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


@dataclass(frozen=True)
class Request:
    """What besides the layout decides sizes.

    Attributes:
        calibrates: scales have to be measured here.
        form: the ONNX form of an ONNX Runtime engine; None where none is written.
        max_length: context of the ONNX Runtime engine, in tokens.
        draft_vocab: tokens that its drafts are drawn from; 0 is all.
        stored_bytes: of one weight in the checkpoint.
        shared_lm_head: all heads use the base's lm_head.
        tokenizer_bytes: of the tokenizer's files, which are copied.
        reserve: bytes that the export wants to see free before it starts.
        batch, context: sequences, and tokens of each, on the GPU.
        portable: the ONNX form of a TensorRT engine; None where none is written.
        of_checkpoint: whether TensorRT-LLM engines are built of the checkpoint.
    """

    calibrates: bool
    form: str | None
    max_length: int
    draft_vocab: int
    stored_bytes: int
    shared_lm_head: bool
    tokenizer_bytes: int
    reserve: int
    batch: int
    context: int
    portable: str | None = None
    of_checkpoint: bool = False


@dataclass(frozen=True)
class Machine:
    """Where the export runs: bytes free on the output's disk, bytes of RAM available, and whether a GPU calibrates."""

    disk_free: int
    ram_available: int
    has_gpu: bool


@dataclass(frozen=True)
class Group:
    """Tensors of one kind in a rank file: how many, how stored, their bytes, and what there is to know about them."""

    name: str
    count: int
    stored: str
    bytes: int
    note: str


@dataclass(frozen=True)
class Item:
    """One part of the disk or of the RAM that is needed: bytes, and where the number comes from."""

    what: str
    bytes: int
    how: str


@dataclass(frozen=True)
class Sizing:
    """What an export will take, in bytes.

    Attributes:
        layout: what is written, by name.
        parameters, head_parameters: weights stored for the base and for all heads.
        tensors: those of rank 0.
        rank_bytes: exact size of every rank file.
        disk: the parts of the output; ``disk_needed`` is their sum.
        disk_reserve: what the export wants to see free before it starts; an upper bound.
        ram: stages of the export, one at a time; the largest and the libraries make ``ram_needed``.
        memory: of one rank's GPU, for the layout's batch and context.
    """

    layout: dict[str, Any]
    parameters: int
    head_parameters: int
    tensors: tuple[Group, ...]
    rank_bytes: tuple[int, ...]
    disk: tuple[Item, ...]
    disk_needed: int
    disk_reserve: int
    disk_free: int
    ram: tuple[Item, ...]
    ram_needed: int
    ram_available: int
    memory: RankMemory
    gpus: tuple[Fit, ...]


def plan_export(arguments: ExportArguments, *, batch: int = 1, context: int | None = None) -> Sizing:
    """The sizes of the export that ``arguments`` ask for. Nothing is written, and no weight is read.

    Args:
        batch: sequences that are to run at once on the GPU.
        context: tokens of each, prompt and output; None takes 4096, or what the model has.

    Raises:
        MedusaExportError: whatever the export refuses before it computes anything, except for values in the weights
            and a full disk.
    """
    require_idle(arguments.output)
    job = Job(arguments, check_values=False)
    job.check()
    _refuse_output(arguments)
    if arguments.format != "trtllm":
        raise ConfigError("--format", arguments.format, "trtllm, the only form with a plan", "leave --format out")
    longest = job.checkpoint.config.max_position_embeddings
    context = min(DEFAULT_CONTEXT, longest) if context is None else context
    for flag, value, most in (("--batch", batch, MAX_BATCH), ("--context", context, longest)):
        if not 1 <= value <= most:
            raise ConfigError(flag, str(value), f"1 .. {most}", "correct it")
    request = Request(
        calibrates=job.has_scales and job.given_scales is None,
        form=onnx_form(job.fmt) if job.writes_engine and job.engine.runs_here else None,
        portable=tensorrt_form(job.fmt).form if job.gpus else None,
        of_checkpoint=job.writes_engine and job.engine.write_graph is None,
        max_length=job.max_length,
        draft_vocab=arguments.draft_vocab,
        stored_bytes=_itemsize(job.checkpoint.dtype(families.EMBED_TOKENS)),
        shared_lm_head=job.checkpoint.heads_share_lm_head,
        tokenizer_bytes=sum(path.stat().st_size for path in job.input_files if path.name in TOKENIZER_FILES),
        reserve=job.estimated_bytes,
        batch=batch,
        context=context,
    )
    return size_export(job.spec, request, _this_machine(arguments.output))


def size_export(spec: ExportSpec, request: Request, machine: Machine) -> Sizing:
    """The sizes of one layout; the same arguments give the same sizes."""
    ranks = plan_ranks(spec)
    rank_bytes = tuple(_file_bytes(rank.tensors) for rank in ranks)
    weights = engine_bytes(spec, ranks[0].tensors)
    disk, ram = tuple(_disk(spec, request, sum(rank_bytes))), tuple(_ram(spec, request, machine))
    return Sizing(
        layout=_layout(spec, request),
        parameters=_parameters(spec),
        head_parameters=_head_parameters(spec, request.shared_lm_head),
        tensors=tuple(_groups(spec, ranks[0].tensors)),
        rank_bytes=rank_bytes,
        disk=disk,
        disk_needed=sum(item.bytes for item in disk),
        disk_reserve=request.reserve,
        disk_free=machine.disk_free,
        ram=ram,
        ram_needed=LIBRARIES + max(item.bytes for item in ram),
        ram_available=machine.ram_available,
        memory=rank_memory(spec, weights, batch=request.batch, context=request.context),
        gpus=tuple(fit(gpu, spec, weights, batch=request.batch, context=request.context) for gpu in GPUS),
    )


def _refuse_output(arguments: ExportArguments) -> None:
    """What the export says of its output directory. Inputs are not hashed; those of an earlier export count as unchanged."""
    out, recorded = arguments.output.resolve(), arguments.recorded()
    inputs = read_manifest(out)["inputs"] if (out / MANIFEST).is_file() else {}
    if not is_up_to_date(out, inputs, recorded):
        _refuse_occupied(out, lambda: inputs, recorded)
    parent = _existing(out.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(str(out.parent), "no way to write there", "a writable directory", "choose another one")


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if each.exists())


def _this_machine(out: Path) -> Machine:
    free = shutil.disk_usage(_existing(out.resolve())).free
    return Machine(free, _available_ram(), torch.cuda.is_available())


def _available_ram() -> int:
    """What the kernel can give without swapping, within the container's limit where there is one."""
    meminfo = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").is_file() else ""
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo)
    available = int(found[1]) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and (bound := limit.read_text().strip()).isdigit():
        return min(available, max(0, int(bound) - int(used.read_text())))
    return available


# What the layout decides.


def _itemsize(dtype: str) -> int:
    size: int = getattr(torch, dtype).itemsize
    return size


def _file_bytes(tensors: Iterable[TensorPlan]) -> int:
    """Of the file that the writer will write, header included."""
    writer = SafetensorsWriter(Path(), tuple(tensors))
    return len(writer._header) + sum(tensor.nbytes for tensor in writer.entries)


def _parameters(spec: ExportSpec) -> int:
    return sum(map(math.prod, spec.config.tensor_shapes().values()))


def _head_parameters(spec: ExportSpec, shared_lm_head: bool) -> int:
    hidden, vocab = spec.config.hidden_size, spec.config.vocab_size
    lm_head = 0 if shared_lm_head else vocab * hidden
    return spec.num_medusa_heads * (spec.num_medusa_layers * hidden * (hidden + 1) + lm_head)


def _layout(spec: ExportSpec, request: Request) -> dict[str, Any]:
    config = spec.config
    return {
        "family": config.family.model_type,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "attention_heads": config.num_attention_heads,
        "key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": spec.padded_vocab,
        "medusa_heads": spec.num_medusa_heads,
        "medusa_layers": spec.num_medusa_layers,
        "max_draft_len": spec.max_draft_len,
        "format": spec.fmt.name,
        "quant_algo": spec.fmt.quant_algo,
        "kv_cache": spec.kv_cache.name,
        "dtype": spec.dtype,
        "tp": spec.tp,
        "batch": request.batch,
        "context": request.context,
    }


def _groups(spec: ExportSpec, tensors: Iterable[TensorPlan]) -> Iterator[Group]:
    """The tensors by name without numbers, in the order of the plan."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for tensor in tensors:
        found.setdefault((_pattern(tensor.name), *_stored(spec, tensor)), []).append(tensor.nbytes)
    for (name, stored, note), sizes in found.items():
        yield Group(name, len(sizes), stored, sum(sizes), note)


def _pattern(name: str) -> str:
    """A tensor's module without numbers; norms, biases and scales are one group each."""
    module, _, kind = name.rpartition(".")
    if kind != "weight":
        return "biases" if kind == "bias" else "scales"
    if module.endswith(("norm", "ln_f")):
        return "norms"
    return re.sub(r"^transformer\.|layers\.|\b\d+\.|medusa_(?=layers)", "", module)


def _stored(spec: ExportSpec, tensor: TensorPlan) -> tuple[str, str]:
    """How a tensor is stored, and why so where it could be expected to be quantized."""
    module, _, kind = tensor.name.rpartition(".")
    if kind != "weight" or len(tensor.shape) != 2:
        return tensor.dtype, ""
    if (bits := built_bits(spec, tensor)) is not None:
        return tensor.dtype, f"{bits} bit in the engine"
    if tensor.dtype != spec.dtype:
        return spec.fmt.name, ""
    return tensor.dtype, "excluded" if spec.fmt.quant_algo and spec.is_excluded(module) else ""


# The disk: what the ONNX writers store, tensor by tensor.


def _disk(spec: ExportSpec, request: Request, rank_bytes: int) -> Iterator[Item]:
    config = json.dumps(trtllm_config(spec), indent=2, sort_keys=True) + "\n"
    files = "the rank file" if spec.tp == 1 else f"{spec.tp} rank files"
    yield Item("trtllm/", rank_bytes + len(config.encode()), f"{files} and config.json, exact")
    if request.form is not None:
        decoder, heads = _decoder_bytes(spec, request, request.form), _heads_bytes(spec, request)
        yield Item("onnx/", decoder, f"decoder, {request.form}")
        yield Item("engine/", decoder + heads + request.tokenizer_bytes, "the decoder again, heads, tokenizer")
    if request.portable is not None:
        graphs = _portable_bytes(spec, request, request.portable)
        yield Item("onnx/", graphs, f"decoder and heads, {request.portable}")
        built = graphs + ENGINE_CODE + request.tokenizer_bytes
        yield Item("engine/", built, "the same weights in the engines, some code, tokenizer: an estimate")
    if request.of_checkpoint:
        yield Item("engine/", 2 * rank_bytes, "where trtllm-build is: one with Medusa, one without; an estimate")
    yield Item("tokenizer/", request.tokenizer_bytes, "as in the checkpoint")


def _portable_bytes(spec: ExportSpec, request: Request, form: str) -> int:
    heads = portable_heads_bytes(spec, request.draft_vocab, request.shared_lm_head)
    return portable_decoder_bytes(spec, form, request.max_length) + heads


def _aligned(tensors: Iterable[int]) -> int:
    """Bytes of a data file: each tensor begins on a page, and small ones lie in the graph's file."""
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in tensors if size > INLINE_BYTES)


# Linears as the TensorRT-LLM checkpoint names them: its patterns exclude some. q, k and v are one matrix in both.
_LINEARS = {
    families.Q_PROJ: "attention.qkv",
    families.O_PROJ: "attention.dense",
    families.GATE_PROJ: "mlp.fc",
    families.UP_PROJ: "mlp.gate",
    families.DOWN_PROJ: "mlp.proj",
}
BLOCK_FORMS = ("int8", "int4", "int4_awq")  # ONNX Runtime keeps these as they are; it makes float32 of the others


def _decoder_bytes(spec: ExportSpec, request: Request, form: str) -> int:
    """decoder.onnx.data: embedding, vocabulary projection, cosines and sines, the last norm, and the layers."""
    config, stored = spec.config, request.stored_bytes
    table = config.vocab_size * config.hidden_size
    tensors = [table * stored, *[FLOAT32 * request.max_length * config.head_dim // 2] * 2, FLOAT32 * config.hidden_size]
    if form in BLOCK_FORMS:
        tensors += _int8(config.vocab_size, config.hidden_size)
    elif not config.tie_word_embeddings:
        tensors.append(table * stored)
    layers = (_layer_tensors(spec, layer, form, stored) for layer in range(config.num_hidden_layers))
    return _aligned(tensors) + sum(map(_aligned, layers))


def _layer_tensors(spec: ExportSpec, layer: int, form: str, stored: int) -> Iterator[int]:
    """Norms and biases are float32."""
    config, shapes = spec.config, spec.config.linear_shapes()
    shapes[families.Q_PROJ] = (config.q_size + 2 * config.kv_size, config.hidden_size)
    excluded = {name: spec.is_excluded(f"transformer.layers.{layer}.{module}") for name, module in _LINEARS.items()}
    gate, up = families.GATE_PROJ, families.UP_PROJ
    if is_one_product(form, [excluded[gate], excluded[up]]):
        shapes[gate], shapes[up] = (2 * config.intermediate_size, config.hidden_size), (0, 0)
    for name in _LINEARS:
        rows, width = shapes[name]
        yield from _matrix("float" if excluded[name] else form, rows, width, spec, stored)
        yield FLOAT32 * rows * config.has_bias(name)
    yield from [FLOAT32 * config.hidden_size] * 2
    yield from [FLOAT32 * config.head_dim * config.family.qk_norm] * 2


def _matrix(form: str, rows: int, width: int, spec: ExportSpec, stored: int) -> tuple[int, ...]:
    """A linear's tensors in an ONNX form: codes, scales a row or a block, zero points, factors of the inputs."""
    size, by_row, by_input = rows * width, FLOAT32 * rows, FLOAT32 * width
    return {
        "float": lambda: (size * stored,),
        "fp8": lambda: (size,),
        "fp8_row": lambda: (size, by_row),
        "int8_row": lambda: (size, by_row, by_input),
        "int8": lambda: _int8(rows, width),
        "int4": lambda: _int4(size, _block(width, SMALL_BLOCKS)),
        "int4_awq": lambda: (*_int4(size, spec.fmt.group_size or 1), by_input),
    }[form]()


def _int8(rows: int, width: int) -> tuple[int, ...]:
    blocks = rows * width // _block(width, BLOCKS)
    return rows * width, FLOAT32 * blocks, blocks


def _int4(size: int, block: int) -> tuple[int, ...]:
    return size // 2, FLOAT32 * size // block, size // block // 2


def _block(width: int, sizes: Iterable[int]) -> int:
    return next((size for size in sizes if width % size == 0), 1)


def _heads_bytes(spec: ExportSpec, request: Request) -> int:
    """heads.onnx.data: float32 blocks, projections to the draft vocabulary, and its token ids."""
    hidden, vocab = spec.config.hidden_size, spec.config.vocab_size
    restricted = 0 < request.draft_vocab < vocab
    rows = request.draft_vocab if restricted else vocab
    blocks = [FLOAT32 * hidden * hidden, FLOAT32 * hidden] * spec.num_medusa_heads * spec.num_medusa_layers
    projection = _int8(rows, hidden) if hidden % 16 == 0 else (FLOAT32 * rows * hidden,)
    projections = projection * (1 if request.shared_lm_head else spec.num_medusa_heads)
    return _aligned([*blocks, *projections, 8 * rows * restricted])


# RAM: stages that follow each other.


def _ram(spec: ExportSpec, request: Request, machine: Machine) -> Iterator[Item]:
    if request.calibrates:
        yield _calibration(spec, machine)
    else:
        yield Item("calibration", 0, "nothing to calibrate")
    yield Item("writing, comparing", STREAMED, "rows at a time, whatever the model (docs/performance.md)")
    if request.form is not None:
        largest = ENGINE_TENSORS * FLOAT16 * _largest(spec)
        yield Item("writing the graphs", largest, f"{ENGINE_TENSORS}x the largest tensor (docs/performance.md)")
        yield _engine_check(spec, request, request.form)
    if request.portable is not None:
        graphs = _portable_bytes(spec, request, request.portable)
        how = f"{BUILD_COPIES}x the graphs, as measured on a small model (docs/tensorrt.md)"
        yield Item("building the engines", BUILD_COPIES * graphs, how)


def _largest(spec: ExportSpec) -> int:
    """Values of the largest tensor of the checkpoint."""
    return max(map(math.prod, spec.config.tensor_shapes().values()))


def _calibration(spec: ExportSpec, machine: Machine) -> Item:
    """The model with one more copy of its largest tensor, and the widest activations of one prompt."""
    config, size = spec.config, FLOAT16 if machine.has_gpu else FLOAT32
    base, heads = _parameters(spec) + _largest(spec), _head_parameters(spec, shared_lm_head=False) * spec.quant_heads
    width = 4 * config.hidden_size + 3 * config.intermediate_size + config.vocab_size * spec.quant_heads
    whole = size * (base + heads + DEFAULT_MAX_LENGTH * width)
    if machine.has_gpu:
        return Item("calibration", size * base, f"16 bit, on its way to the GPU; there it takes {readable(whole)}")
    return Item("calibration", whole, f"the model{' and its heads' * spec.quant_heads} in float32, activations")


def _engine_check(spec: ExportSpec, request: Request, form: str) -> Item:
    """ONNX Runtime's session and cache, float32 copies of what it folds, and a small model's reference."""
    config = spec.config
    linears = config.num_hidden_layers * sum(map(math.prod, config.linear_shapes().values()))
    files = _decoder_bytes(spec, request, form) + _heads_bytes(spec, request)
    copies = files if form in BLOCK_FORMS else FLOAT32 * (linears + config.vocab_size * config.hidden_size)
    cache = FLOAT32 * 2 * config.num_hidden_layers * config.kv_size * request.max_length
    if linears >= SMALL_MODEL:
        return Item("checking the engine", files + copies + cache, "its weights in ONNX Runtime")
    reference = FLOAT32 * (_parameters(spec) + _largest(spec))
    return Item(
        "checking the engine", files + copies + cache + reference, "its weights in ONNX Runtime, the model in float32"
    )


def readable(number: int) -> str:
    """Bytes in decimal units, three to four digits."""
    unit, name = next(((unit, name) for unit, name in UNITS if number >= unit), (1, "B"))
    return f"{number / unit:.{2 if number < 100 * unit else 1}f} {name}" if unit > 1 else f"{number} B"
