"""What an export will take, from config.json and tensor headers alone: files, disk, RAM here, and memory of GPUs."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from medusa_export.core.artifacts.manifest import MANIFEST, is_up_to_date, read_manifest, refuse_occupied
from medusa_export.core.artifacts.staging import require_idle
from medusa_export.core.errors import ConfigError, OutputError
from medusa_export.core.text.tokenizer import TOKENIZER_FILES
from medusa_export.exporter.job.arguments import ExportArguments
from medusa_export.exporter.job.job import Job
from medusa_export.exporter.job.output_forms import OUTPUT_FORMS
from medusa_export.exporter.onnx.forms import onnx_form
from medusa_export.exporter.pipeline.parts import require_writable
from medusa_export.exporter.plan.spec import ExportSpec
from medusa_export.exporter.plan.tensor_plan import TensorPlan
from medusa_export.exporter.plan.trtllm_layout import plan_ranks
from medusa_export.exporter.sizing.disk import disk_items
from medusa_export.exporter.sizing.gpus import (
    GPUS,
    MAX_BATCH,
    built_bits,
    engine_bytes,
    fit,
    rank_memory,
)
from medusa_export.exporter.sizing.memory import LIBRARIES, available_ram, ram_items
from medusa_export.exporter.sizing.speed import estimate_speeds, known_acceptance
from medusa_export.exporter.sizing.types import (
    ExportMachine,
    Group,
    Request,
    Sizing,
    head_parameter_count,
    parameter_count,
)
from medusa_export.exporter.write.safetensors import SafetensorsWriter
from medusa_export.heads.checkpoint import families
from medusa_export.quantize.tensorrt_targets import tensorrt_form

logger = logging.getLogger(__name__)

DEFAULT_CONTEXT = 4096  # tokens, where the model has as many


def plan_export(arguments: ExportArguments, *, batch: int = 1, context: int | None = None) -> Sizing:
    """The sizes of the export that ``arguments`` ask for. Nothing is written, and no weight is read.

    Args:
        batch: sequences that are to run at once on the GPU.
        context: tokens of each, prompt and output; None takes 4096, or what the model has.

    Raises:
        MedusaExportError: whatever the export refuses before it computes anything, except for values in the weights
            and a full disk.
    """
    with tempfile.TemporaryDirectory(prefix="medusa-plan-") as folder:
        return _plan(arguments, Path(folder), batch, context)


def _plan(arguments: ExportArguments, headers: Path, batch: int, context: int | None) -> Sizing:
    require_idle(arguments.output)
    job = Job(arguments, headers=headers)
    job.check()
    require_writable(job)
    _refuse_output(arguments)
    if not job.form.has_engine:
        planned = ", ".join(name for name, form in OUTPUT_FORMS.items() if form.has_engine)
        raise ConfigError("--format", arguments.format, f"{planned}, the only form with a plan", "leave --format out")
    longest = job.checkpoint.config.max_position_embeddings
    context = min(DEFAULT_CONTEXT, longest) if context is None else context
    for flag, value, most in (("--batch", batch, MAX_BATCH), ("--context", context, longest)):
        if not 1 <= value <= most:
            raise ConfigError(flag, str(value), f"1 .. {most}", "correct it")
    request = Request(
        calibrates=job.has_scales and job.given_scales is None,
        onnx_form=onnx_form(job.weight_format).form if job.writes_engine and job.engine.runs_here else None,
        portable=tensorrt_form(job.weight_format).form if job.gpus else None,
        of_checkpoint=job.writes_engine and not job.engine.has_graph,
        max_length=job.max_length,
        draft_vocab=arguments.draft_vocab,
        stored_bytes=_itemsize(job.checkpoint.dtype(families.EMBED_TOKENS)),
        shared_lm_head=job.checkpoint.heads_share_lm_head,
        tokenizer_bytes=sum(path.stat().st_size for path in job.input_files if path.name in TOKENIZER_FILES),
        reserve=job.estimated_bytes,
        batch=batch,
        context=context,
    )
    speeds = estimate_speeds(
        job.target, known_acceptance(arguments.heads or arguments.ckpt),
        max_draft_len=job.spec.max_draft_len, batch=batch, context=context,
    )  # fmt: skip
    return replace(size_export(job.spec, request, this_machine(arguments.output)), speeds=speeds)


def size_export(spec: ExportSpec, request: Request, machine: ExportMachine) -> Sizing:
    """The sizes of one layout; the same arguments give the same sizes.

    Args:
        spec: the layout.
        request: what is written and run besides the checkpoint.
        machine: disk and memory here.
    """
    ranks = plan_ranks(spec)
    rank_bytes = tuple(_file_bytes(rank.tensors) for rank in ranks)
    weights = engine_bytes(spec, ranks[0].tensors)
    disk, ram = tuple(disk_items(spec, request, sum(rank_bytes))), tuple(ram_items(spec, request, machine))
    return Sizing(
        layout=_layout(spec, request),
        parameters=parameter_count(spec),
        head_parameters=head_parameter_count(spec, request.shared_lm_head),
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
        refuse_occupied(out, lambda: inputs, recorded)
    parent = _existing(out.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(str(out.parent), "no write access", "a writable directory", "choose another one")


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if each.exists())


def this_machine(out: Path) -> ExportMachine:
    free = shutil.disk_usage(_existing(out.resolve())).free
    return ExportMachine(free, available_ram(), torch.cuda.is_available())


# What the layout decides.


def _itemsize(dtype: str) -> int:
    size: int = getattr(torch, dtype).itemsize
    return size


def _file_bytes(tensors: Iterable[TensorPlan]) -> int:
    """Size of the file that the writer will write, header included."""
    writer = SafetensorsWriter(Path(), tuple(tensors))
    return len(writer._header) + sum(tensor.nbytes for tensor in writer.entries)


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
        "format": spec.weight_format.name,
        "quant_algo": spec.weight_format.trtllm.algo,
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
        return spec.weight_format.name, ""
    return tensor.dtype, "excluded" if spec.weight_format.is_quantized and spec.is_excluded(module) else ""


# The disk: what the ONNX writers store, tensor by tensor.


# RAM: stages that follow each other.
