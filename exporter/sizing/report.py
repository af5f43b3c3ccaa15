"""What an export will take, as tables for people."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from medusa_export.core.text.words import counted
from medusa_export.exporter.sizing.gpus import KV_FRACTION, MAX_BATCH, MAX_NUM_TOKENS
from medusa_export.exporter.sizing.memory import LIBRARIES
from medusa_export.exporter.sizing.speed import Speed
from medusa_export.exporter.sizing.types import Item, Sizing, readable


def print_sizing(sizing: Sizing, console: Console) -> None:
    """The tables, readable from 80 columns on."""
    makers = (_layout_table, _tensor_table, _disk_table, _ram_table, _memory_table, _gpu_table)
    for make in makers:
        console.print(make(sizing))
    if sizing.speeds:
        console.print(_speed_table(sizing))
    console.print(
        "GPU figures leave out CUDA's context and libraries, NCCL's buffers and kernels' workspaces.",
        style="dim",
    )


def _table(title: str, *columns: str, right: Iterable[str] = ("size",)) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_header=any(columns))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _layout_table(sizing: Sizing) -> Table:
    layout, table = sizing.layout, _table("Layout", "", "")
    medusa = f"{counted(layout['medusa_heads'], 'head')} of {counted(layout['medusa_layers'], 'layer')}"
    rows = {
        "model": "{family}, {layers} layers, hidden {hidden_size}, mlp {intermediate_size}",
        "attention": "{attention_heads} query and {key_value_heads} key/value heads of {head_dim}",
        "vocabulary": "{vocab_size}, padded to {padded_vocab_size}",
        "parameters": f"{sizing.parameters:,} and {sizing.head_parameters:,} of the heads",
        "Medusa": medusa + ", max_draft_len {max_draft_len}",
        "format": f"{{format}} ({layout['quant_algo'] or '16 bit'}), kv cache {{kv_cache}}, dtype {{dtype}}",
        "ranks": "tp {tp}",
    }
    for name, text in rows.items():
        table.add_row(name, text.format_map(layout))
    return table


def _tensor_table(sizing: Sizing) -> Table:
    title = "TensorRT-LLM checkpoint: tensors of one rank"
    table = _table(title, "tensor", "count", "stored", "size", "", right=("count", "size"))
    for group in sizing.tensors:
        table.add_row(group.name, str(group.count), group.stored, readable(group.bytes), group.note)
    table.add_section()
    largest = max(sizing.rank_bytes)
    table.add_row("a rank file, exact", str(len(sizing.rank_bytes)), "", readable(largest), f"{largest:,} bytes")
    return table


def _disk_table(sizing: Sizing) -> Table:
    table = _table("Disk", "part", "size", "")
    _add_items(table, sizing.disk)
    enough = "enough" if sizing.disk_free >= sizing.disk_reserve else "NOT ENOUGH"
    table.add_row("in all", readable(sizing.disk_needed), "")
    table.add_row(
        "free", readable(sizing.disk_free), f"{enough}: an export starts with {readable(sizing.disk_reserve)} free"
    )
    return table


def _ram_table(sizing: Sizing) -> Table:
    table = _table("RAM for the export, estimate", "stage", "size", "")
    _add_items(table, sizing.ram)
    enough = "enough" if sizing.ram_available >= sizing.ram_needed else "NOT ENOUGH"
    table.add_row("in all", readable(sizing.ram_needed), f"the largest, and {readable(LIBRARIES)} of libraries")
    table.add_row("available here", readable(sizing.ram_available), enough)
    return table


def _add_items(table: Table, items: Iterable[Item]) -> None:
    for item in items:
        table.add_row(item.what, readable(item.bytes), item.how)
    table.add_section()


def _memory_table(sizing: Sizing) -> Table:
    layout, memory = sizing.layout, sizing.memory
    table = _table("GPU memory of one rank", "what", "size", "")
    nodes, outputs = layout["batch"] * (layout["max_draft_len"] + 1), layout["medusa_heads"] + 1
    tokens, vocab = max(MAX_NUM_TOKENS, nodes), layout["padded_vocab_size"]
    for name, size, how in (
        ("weights", memory.weights, "in the engine"),
        ("cache of a token", memory.kv_token, f"kv cache {layout['kv_cache']}"),
        ("cache of a sequence", memory.kv_sequence, f"{layout['context']} tokens and the tree, in whole blocks"),
        ("cache of the batch", memory.kv_batch, counted(layout["batch"], "sequence")),
        ("activations", memory.activations, f"estimate: one layer, {tokens} tokens"),
        ("logits", memory.logits, f"estimate: {outputs} x {nodes} x {vocab} float32"),
    ):
        table.add_row(name, readable(size), how)
    return table


def _gpu_table(sizing: Sizing) -> Table:
    layout = sizing.layout
    fits = f"batch {layout['batch']}"
    count = counted(layout["tp"], "GPU")
    title = f"{count}, {layout['context']} tokens a sequence; cache: {KV_FRACTION:.0%} of what is left"
    table = _table(title, "GPU", "cache room", fits, "max batch", "", right=("cache room", "max batch"))
    for row in sizing.gpus:
        if row.reason:
            table.add_row(row.gpu, "-", "no", "-", row.reason)
        else:
            largest = f"{row.largest_batch}{' or more' * (row.largest_batch == MAX_BATCH)}"
            table.add_row(row.gpu, readable(row.cache_room), "fits" if row.fits else "does not fit", largest, "")
    return table


def _speed_table(sizing: Sizing) -> Table:
    layout = sizing.layout
    title = (
        f"Speed on {counted(layout['tp'], 'GPU')}, estimated from data sheets, not measured; batch {layout['batch']}"
    )
    draft, known = layout["max_draft_len"], any(speed.predicted for speed in sizing.speeds)
    step = f"step with {draft} draft tokens"
    with_medusa = ("best tree", "tokens/s with", "gain") if known else ()
    table = _table(
        title, "GPU", "tokens/s without", step, *with_medusa, "", right=("tokens/s without", "tokens/s with")
    )
    for speed in sizing.speeds:
        if speed.reason:
            table.add_row(speed.gpu, "-", *("-" for _ in (step, *with_medusa)), speed.reason)
            continue
        low, high = speed.step_ratio_range
        cells = [speed.gpu, f"{speed.without_medusa:.0f}", f"{speed.step_ratio:.2f}x ({low:.2f} .. {high:.2f})"]
        table.add_row(*cells, *(_predicted(speed) if known else ()), "")
    return table


def _predicted(speed: Speed) -> tuple[str, str, str]:
    found = speed.predicted or {}
    if not found["max_draft_len"]:
        return "no tree", f"{found['tokens_per_second']['without_medusa']:.0f}", "1.00x"
    low, high = found["speedup_interval"]
    gain = f"{found['speedup']:.2f}x ({low:.2f} .. {high:.2f})"
    return f"{found['max_draft_len']} draft tokens", f"{found['tokens_per_second']['medusa']:.0f}", gain
