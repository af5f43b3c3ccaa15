"""medusa-doctor's page, and the table of formats."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from medusa_export.exporter.doctor.abilities import GPU, abilities, formats_here, to_install
from medusa_export.exporter.doctor.machine import Machine
from medusa_export.exporter.doctor.packages import PACKAGES, Found
from medusa_export.quantize.format_facts import TensorRt
from medusa_export.quantize.formats import FORMATS, KV_CACHE

YES, NO = "yes", "-"
COPIED = ("package", "--quant", "--kv-cache")  # columns of names that people copy: never broken


def page(machine: Machine, found: Mapping[str, Found]) -> dict[str, Any]:
    """Everything that is printed, as JSON takes it."""
    sms = [gpu.sm for gpu in machine.gpus]
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": asdict(machine) | {"cache": str(machine.cache) if machine.cache else None},
        "packages": {name: asdict(each) for name, each in found.items()},
        "abilities": [{"what": each.name, "missing": each.missing(found, sms)} for each in abilities()],
        "formats": {
            name: {"missing": missing, "runs_on": runs} for name, (missing, runs) in formats_here(found, sms).items()
        },
        "install": to_install(found, sms),
    }


def print_page(body: Mapping[str, Any], console: Console) -> None:
    """For people, from 80 columns on."""
    _print_machine(body, console)
    packages = _table("package", "version", "for", title="Packages")
    for name, each in body["packages"].items():
        state = each["problem"] or PACKAGES[name].brings
        packages.add_row(name, (each["version"] or "here") if each["is_here"] else "missing", state)
    console.print(packages)
    can = _table("what", "here", title="What works here")
    for each in body["abilities"]:
        can.add_row(each["what"], _said(each["missing"], YES))
    console.print(can)
    formats = _table("--quant", "checkpoint", "engines that run here", title="Formats")
    for name, row in body["formats"].items():
        formats.add_row(name, _said(row["missing"], YES), ", ".join(row["runs_on"]) or NO)
    console.print(formats)
    for command, names in body["install"].items():
        console.print(f"{', '.join(names)}: {command}", soft_wrap=True)
    if any(GPU in each["missing"] for each in body["abilities"]):
        console.print(f"{GPU}: {body['machine']['gpus_said']}", soft_wrap=True)


def _print_machine(body: Mapping[str, Any], console: Console) -> None:
    machine = body["machine"]
    table = _table("", "", title=f"medusa-export on Python {body['python']}, {body['system']}")
    table.show_header = False
    for gpu in machine["gpus"]:
        table.add_row("GPU", f"{gpu['name']}, SM {gpu['sm']}, {_gb(gpu['memory'])}, driver {gpu['driver']}")
    if not machine["gpus"]:
        table.add_row("GPU", f"none found ({machine['gpus_said']})")
    free = f", {_gb(machine['free_memory'])} of it free" if machine["free_memory"] is not None else ""
    table.add_row("memory", f"{_gb(machine['memory'])}{free}" if machine["memory"] else "unknown")
    table.add_row("disk", f"{_gb(machine['free_disk'])} free here")
    cache = machine["cache"]
    table.add_row("cache", f"{cache}, {_gb(machine['cache_bytes'])}" if cache else "off (MEDUSA_EXPORT_CACHE)")
    console.print(table)


def _said(missing: Sequence[str], otherwise: str) -> str:
    return f"no: needs {', '.join(missing)}" if missing else otherwise


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def print_formats(found: Mapping[str, Found], gpus: Sequence[int], console: Console) -> None:
    """Every weight format and key/value cache, from the table that exports are made by, and what this machine can do with it.

    Args:
        found: packages, by name.
        gpus: compute capabilities of the GPUs that are here.
        console: where to.
    """
    table = _table("--quant", "weights", "inputs", "prompts", "TRT-LLM", "TRT", "CPU", "hf", "here")
    here = formats_here(found, gpus)
    for name, row in FORMATS.items():
        missing, runs = here[name]
        table.add_row(
            name, f"{row.trtllm.engine_bits} bit", row.trtllm.products, YES if row.needs_calibration else NO,
            _sms(row.trtllm.min_sm, row.trtllm.max_sm), _sms(row.tensorrt.min_sm, None) if isinstance(row.tensorrt, TensorRt) else NO,
            YES if row.onnxruntime else NO, YES if row.huggingface else NO, _said(missing, "made, run" if runs else "made"),
        )  # fmt: skip
    console.print(table)
    caches = _table("--kv-cache", "values", "prompts", "TRT-LLM", "hf")
    for name, cache in KV_CACHE.items():
        cells = (f"{8 * cache.bytes} bit", YES if cache.needs_calibration else NO, _sms(cache.min_sm, cache.max_sm))
        caches.add_row(name, *cells, YES if cache.in_huggingface else NO)
    console.print(caches)
    for line in (
        "weights, inputs: of a TensorRT-LLM engine. prompts: whether it is calibrated.",
        "TRT-LLM, TRT: GPUs of TensorRT-LLM and TensorRT, by SM (89 Ada, 90 Hopper).",
        "CPU: ONNX Runtime. hf: ModelOpt's unified checkpoint.",
        "here: on this machine; medusa-doctor says more.",
    ):
        console.print(line, style="dim")


def _sms(least: int, most: int | None) -> str:
    return f"{least}+" if most is None else f"{least}..{most}"


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in COPIED)
    return table
