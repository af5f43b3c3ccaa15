"""medusa-tree cost --gpu: costs of steps from a GPU's data sheet. Like the other cli files, it may import across."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.cli.console import stdout
from medusa_export.heads.roofline.gpus import BY_KEY
from medusa_export.heads.roofline.step import DEFAULTS
from medusa_export.quantize.formats import FORMATS, KV_CACHE

SHOWN_NODES = (8, 16, 32, 64)

PANEL = "Estimate, with --gpu"
GpuName = Annotated[
    str | None,
    typer.Option(
        "--gpu", help=f"Estimate instead of measuring, for this GPU: {', '.join(BY_KEY)}.", rich_help_panel=PANEL
    ),
]
Ckpt = Annotated[Path | None, typer.Option(help="Base model; only its config.json is read.", rich_help_panel=PANEL)]
Heads = Annotated[Path | None, typer.Option(help="Medusa heads; only headers are read.", rich_help_panel=PANEL)]
NumHeads = Annotated[int, typer.Option(help="Heads of one block, where there are none yet.", rich_help_panel=PANEL)]
Quant = Annotated[str, typer.Option(help=f"Weights: {', '.join(FORMATS)}.", rich_help_panel=PANEL)]
KvCacheName = Annotated[str, typer.Option("--kv-cache", help=f"Cache: {', '.join(KV_CACHE)}.", rich_help_panel=PANEL)]
QuantHeads = Annotated[bool, typer.Option(help="Quantize the heads too.", rich_help_panel=PANEL)]
Tp = Annotated[int, typer.Option(help="Tensor-parallel GPUs.", rich_help_panel=PANEL)]
Bandwidth = Annotated[float, typer.Option(help="Part of the memory bandwidth that kernels get.", rich_help_panel=PANEL)]
Arithmetic = Annotated[float, typer.Option(help="Part of the tensor throughput that they get.", rich_help_panel=PANEL)]
KernelUs = Annotated[float, typer.Option(help="Microseconds that a kernel takes besides.", rich_help_panel=PANEL)]
CollectiveUs = Annotated[float, typer.Option(help="Latency of an all-reduce, microseconds.", rich_help_panel=PANEL)]


def write_estimate(output: Path, given: dict[str, Any]) -> list[dict[str, Any]]:
    """Write ``cost.json`` of an estimate.

    Args:
        given: values of the flags of medusa-tree cost, by name.

    Raises:
        ConfigError: flags that do not go together, an unknown GPU, a format that it has not, or a model that it does not hold.
    """
    from medusa_export.exporter.job.gpu_costs import Target
    from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
    from medusa_export.heads.checkpoint.head_layouts import open_heads
    from medusa_export.heads.roofline.curves import BATCHES, PAST_LENGTHS, estimate_costs
    from medusa_export.heads.roofline.gpus import find_gpu
    from medusa_export.quantize.formats import get_format

    gpu = find_gpu(given["gpu"])
    if given["ckpt"] is None:
        raise ConfigError("--gpu", "no --ckpt", "the directory with config.json", "give one")
    if given["num_heads"] < 1:
        raise ConfigError("--num-heads", str(given["num_heads"]), "1 or more", "correct it")
    config = DecoderConfig.from_dir(given["ckpt"])
    found = open_heads(given["heads"], config, check_values=False) if given["heads"] else None
    heads, layers = (found.num_heads, found.num_layers) if found else (given["num_heads"], 1)
    fmt = get_format(given["quant"])
    target = Target(config, heads, layers, fmt, given["kv_cache"], given["quant_heads"], given["tp"])
    lengths = given["past_length"] or [past for past in PAST_LENGTHS if past < config.max_position_embeddings]
    body = estimate_costs(
        target.on(gpu), batches=_positive("--batch", given["batch"] or BATCHES),
        past_lengths=_positive("--past-length", lengths), plain=target.without_heads(gpu), assumptions=_assumptions(given),
    )  # fmt: skip
    if not body["curves"]:
        raise ConfigError(gpu.name, "a model that its memory does not hold", "one that fits", "raise --tp or quantize")
    output.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    curves: list[dict[str, Any]] = body["curves"]
    return curves


def print_estimate(curves: Sequence[dict[str, Any]]) -> None:
    """A line a curve: the step without a tree, and what trees cost over it."""
    title = (
        f"estimated for {curves[0]['estimated']}, not measured: a step without a tree, and steps with all heads over it"
    )
    nodes = (*(f"{size} nodes" for size in SHOWN_NODES), f"{SHOWN_NODES[-1]} nodes, range")
    table = Table("batch", "past length", "ms", *nodes, title=title, title_justify="left")
    for curve in curves:
        base, draft = curve["verify"][0], curve["draft"][-1]["ms"]
        rows = {row["nodes"]: row for row in curve["verify"]}
        ratios = [f"{(rows[size]['ms'] + draft) / base['ms']:.2f}" for size in SHOWN_NODES]
        low, high = rows[SHOWN_NODES[-1]]["step_ratio_range"]
        cells = (str(curve["batch"]), str(curve["past_length"]), f"{base['ms']:.2f}")
        table.add_row(*cells, *ratios, f"{low:.2f} .. {high:.2f}")
    stdout.print(table)


def expected_line(output: Path) -> str | None:
    """What an export with --gpu-model expects on that GPU; None for another export."""
    from medusa_export.core.json_fields import read_json
    from medusa_export.exporter.pipeline.parts import GPU_ESTIMATE

    if not (output / GPU_ESTIMATE).is_file():
        return None
    found = read_json(output / GPU_ESTIMATE)["predicted"]
    speed, (low, high) = found["tokens_per_second"], found["speedup_interval"]
    return (
        f"expected on {found['estimated']}, estimated from its data sheet: {speed['medusa']:.0f} tokens/s with "
        f"{found['max_draft_len']} draft tokens, {speed['without_medusa']:.0f} without: {found['speedup']:.2f}x "
        f"({low:.2f} .. {high:.2f})"
    )


def _assumptions(given: dict[str, Any]) -> Any:
    names = {"bandwidth": "bandwidth_efficiency", "arithmetic": "arithmetic_efficiency"}
    names |= {name: name for name in ("kernel_us", "collective_us")}
    return replace(DEFAULTS, **{name: given[flag] for name, flag in names.items()})


def _positive(flag: str, values: Sequence[int]) -> Sequence[int]:
    if min(values) < 1:
        raise ConfigError(flag, str(min(values)), "1 or more", "correct it")
    return values
