"""medusa-tree cost --gpu: costs of steps from a GPU's data sheet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa_export.core.artifacts.output_file import write_output
from medusa_export.core.errors import ConfigError
from medusa_export.core.flags import COUNT, NUMBER, Bounds, flag
from medusa_export.exporter.cli.console import stdout
from medusa_export.exporter.cli.tree_tables import narrow_table
from medusa_export.heads.roofline.gpus import ARITHMETIC, BANDWIDTH, BY_KEY, COLLECTIVE_US, KERNEL_US
from medusa_export.quantize.formats import FORMATS, KV_CACHE

if TYPE_CHECKING:
    from medusa_export.heads.roofline.step import Assumptions

SHOWN_NODES = (8, 16, 32, 64)

PANEL = "Estimate, with --gpu"  # heading of --help
GPU = "--gpu"


@dataclass(frozen=True)
class EstimateFlags:
    """What an estimate takes."""

    gpu: str | None = flag(None, help="Estimate for this GPU instead of measuring.", panel=PANEL, choices=tuple(BY_KEY))
    ckpt: Path | None = flag(
        None, help="Base model, or its name on the hub; only config.json is read.", panel=PANEL, requires=GPU
    )
    heads: Path | None = flag(None, help="Medusa heads; only their headers are read.", panel=PANEL, requires=GPU)
    num_heads: int = flag(
        4, help="Heads to assume without --heads, of one block each.", panel=PANEL, requires=GPU, bounds=NUMBER
    )
    quant: str = flag("none", help="Weight format.", panel=PANEL, choices=tuple(FORMATS), requires=GPU)
    kv_cache: str = flag("none", help="Key/value cache format.", panel=PANEL, choices=tuple(KV_CACHE), requires=GPU)
    quant_heads: bool = flag(
        False, help="Quantize the heads too.", panel=PANEL, opposite="--no-quant-heads", requires=GPU
    )
    tp: int = flag(1, help="Tensor-parallel GPUs.", panel=PANEL, requires=GPU, bounds=NUMBER)
    bandwidth_efficiency: float = flag(
        BANDWIDTH,
        help="Share of the memory bandwidth that kernels reach.",
        panel=PANEL,
        requires=GPU,
        bounds=Bounds(above=0, most=1),
    )
    arithmetic_efficiency: float = flag(
        ARITHMETIC,
        help="Share of the tensor throughput that they reach.",
        panel=PANEL,
        requires=GPU,
        bounds=Bounds(above=0, most=1),
    )
    kernel_us: float = flag(
        KERNEL_US, help="Overhead per kernel, in microseconds.", panel=PANEL, requires=GPU, bounds=COUNT
    )
    collective_us: float = flag(
        COLLECTIVE_US,
        help="Latency of an all-reduce, in microseconds.",
        panel=PANEL,
        requires=GPU,
        bounds=COUNT,
    )

    def assumptions(self) -> Assumptions:
        """What the data sheet does not say."""
        from medusa_export.heads.roofline.step import DEFAULTS

        return replace(
            DEFAULTS, bandwidth=self.bandwidth_efficiency, arithmetic=self.arithmetic_efficiency, kernel_us=self.kernel_us,
            collective_us=self.collective_us,
        )  # fmt: skip


def write_estimate(
    output: Path, gpu_name: str, asked: EstimateFlags, batches: Sequence[int], past_lengths: Sequence[int]
) -> list[dict[str, Any]]:
    """Write ``cost.json`` of an estimate.

    Args:
        output: file to write.
        gpu_name: which GPU.
        asked: what is estimated.
        batches: sequences in a step; empty for the default ones.
        past_lengths: tokens in the cache; empty for the default ones.

    Raises:
        ConfigError: flags that do not go together, an unknown GPU, a format that it has not, or a model that it does not hold.
    """
    from medusa_export.core.hub import HEADS, find_model
    from medusa_export.exporter.job.gpu_costs import Target
    from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
    from medusa_export.heads.checkpoint.head_layouts import open_heads
    from medusa_export.heads.roofline.curves import BATCHES, PAST_LENGTHS, estimate_costs
    from medusa_export.heads.roofline.gpus import find_gpu
    from medusa_export.quantize.formats import get_format

    gpu = find_gpu(gpu_name)
    if asked.ckpt is None:
        raise ConfigError("--gpu", "no --ckpt", "a directory with config.json, or a name on the hub", "give one")
    config = DecoderConfig.from_dir(find_model(asked.ckpt, wanted=()).path)
    place = find_model(asked.heads, wanted=HEADS).path if asked.heads else None
    found = open_heads(place, config, check_values=False) if place else None
    heads, layers = (found.num_heads, found.num_layers) if found else (asked.num_heads, 1)
    target = Target(config, heads, layers, get_format(asked.quant), asked.kv_cache, asked.quant_heads, asked.tp)
    lengths = past_lengths or [past for past in PAST_LENGTHS if past < config.max_position_embeddings]
    body = estimate_costs(
        target.on(gpu), batches=_positive("--batch", batches or BATCHES),
        past_lengths=_positive("--past-length", lengths), plain=target.without_heads(gpu), assumptions=asked.assumptions(),
    )  # fmt: skip
    if not body["curves"]:
        raise ConfigError(
            gpu.name, "a model that does not fit into its memory", "one that fits", "raise --tp or quantize"
        )
    write_output(output, json.dumps(body, indent=1) + "\n")
    curves: list[dict[str, Any]] = body["curves"]
    return curves


def print_estimate(curves: Sequence[dict[str, Any]]) -> None:
    """A line a curve: the step without a tree, and what trees cost over it."""
    origin = f"estimated for {curves[0]['estimated']}, not measured"
    title = f"{origin}: ms of a step without a tree, and the extra cost of a step by its nodes, with all heads"
    sizes = (f"{size}\nnodes" for size in SHOWN_NODES)
    names = ("batch", "past\nlength", "ms", *sizes, f"{SHOWN_NODES[-1]} nodes,\nrange")
    table = narrow_table(*names, title=title)
    for curve, following in zip(curves, [*curves[1:], None], strict=True):
        base, draft = curve["verify"][0], curve["draft"][-1]["ms"]
        rows = {row["nodes"]: row for row in curve["verify"]}
        ratios = [f"{(rows[size]['ms'] + draft) / base['ms']:.2f}" for size in SHOWN_NODES]
        low, high = rows[SHOWN_NODES[-1]]["step_ratio_range"]
        cells = (str(curve["batch"]), str(curve["past_length"]), f"{base['ms']:.2f}", *ratios, f"{low:.2f}-{high:.2f}")
        table.add_row(*cells, end_section=following is not None and following["batch"] != curve["batch"])
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


def _positive(flag: str, values: Sequence[int]) -> Sequence[int]:
    if min(values) < 1:
        raise ConfigError(flag, str(min(values)), "1 or more", "correct it")
    return values
