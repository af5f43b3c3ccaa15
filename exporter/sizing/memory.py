"""RAM that an export takes, stage by stage."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from medusa_export.exporter.job.arguments import SMALL_MODEL
from medusa_export.exporter.onnx.linear import LINEAR_FORMS
from medusa_export.exporter.plan.spec import ExportSpec
from medusa_export.exporter.sizing.disk import decoder_bytes, heads_bytes, portable_bytes
from medusa_export.exporter.sizing.types import (
    BUILD_COPIES,
    FLOAT16,
    FLOAT32,
    ExportMachine,
    Item,
    Request,
    head_parameter_count,
    parameter_count,
    readable,
)
from medusa_export.quantize.calibration_data import DEFAULT_MAX_LENGTH

# Measured, see docs/performance.md, "Memory of the export": no writer and no check took more than 10 times the largest
# tensor in 16 bit, whatever the number of layers. LIBRARIES is RssAnon after the imports, with CPython 3.11 on Linux.
STREAMED, ENGINE_TENSORS, LIBRARIES = 300_000_000, 3, 400_000_000  # docs/performance.md


def available_ram() -> int:
    """What the kernel can give without swapping, within the container's limit where there is one."""
    meminfo = Path("/proc/meminfo").read_text() if Path("/proc/meminfo").is_file() else ""
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo)
    available = int(found[1]) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and (bound := limit.read_text().strip()).isdigit():
        return min(available, max(0, int(bound) - int(used.read_text())))
    return available


def ram_items(spec: ExportSpec, request: Request, machine: ExportMachine) -> Iterator[Item]:
    """What each stage of an export takes of RAM, in bytes.

    Args:
        spec: the layout.
        request: what is written besides the checkpoint.
        machine: whether there is a GPU to calibrate on.
    """
    if request.calibrates:
        yield _calibration(spec, machine)
    else:
        yield Item("calibration", 0, "nothing to calibrate")
    yield Item("writing, comparing", STREAMED, "rows at a time, whatever the model (docs/performance.md)")
    if request.onnx_form is not None:
        largest = ENGINE_TENSORS * FLOAT16 * _largest(spec)
        yield Item("writing the graphs", largest, f"{ENGINE_TENSORS}x the largest tensor (docs/performance.md)")
        yield _engine_check(spec, request, request.onnx_form)
    if request.portable is not None:
        graphs = portable_bytes(spec, request)
        how = f"{BUILD_COPIES}x the graphs, as measured on a small model (docs/tensorrt.md)"
        yield Item("building the engines", BUILD_COPIES * graphs, how)


def _largest(spec: ExportSpec) -> int:
    """Values of the largest tensor of the checkpoint."""
    return max(map(math.prod, spec.config.tensor_shapes().values()))


def _calibration(spec: ExportSpec, machine: ExportMachine) -> Item:
    """The model with one more copy of its largest tensor, and the widest activations of one prompt."""
    config, size = spec.config, FLOAT16 if machine.has_gpu else FLOAT32
    base, heads = (
        parameter_count(spec) + _largest(spec),
        head_parameter_count(spec, shared_lm_head=False) * spec.quant_heads,
    )
    width = 4 * config.hidden_size + 3 * config.intermediate_size + config.vocab_size * spec.quant_heads
    whole = size * (base + heads + DEFAULT_MAX_LENGTH * width)
    if machine.has_gpu:
        return Item("calibration", size * base, f"16 bit, on its way to the GPU; there it takes {readable(whole)}")
    return Item("calibration", whole, f"the model{' and its heads' * spec.quant_heads} in float32, activations")


def _engine_check(spec: ExportSpec, request: Request, onnx_form: str) -> Item:
    """ONNX Runtime's session and cache, float32 copies of what it folds, and a small model's reference."""
    config = spec.config
    linears = config.num_hidden_layers * sum(map(math.prod, config.linear_shapes().values()))
    files = decoder_bytes(spec, request, onnx_form) + heads_bytes(spec, request)
    copies = (
        files if LINEAR_FORMS[onnx_form].keeps_codes else FLOAT32 * (linears + config.vocab_size * config.hidden_size)
    )
    cache = FLOAT32 * 2 * config.num_hidden_layers * config.kv_size * request.max_length
    if linears >= SMALL_MODEL:
        return Item("checking the engine", files + copies + cache, "its weights in ONNX Runtime")
    reference = FLOAT32 * (parameter_count(spec) + _largest(spec))
    return Item(
        "checking the engine", files + copies + cache + reference, "its weights in ONNX Runtime, the model in float32"
    )
