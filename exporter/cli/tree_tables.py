"""Tables that medusa-tree prints."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from medusa_export.core.text.words import counted
from medusa_export.exporter.cli.console import stdout

SHOWN = (1, 2, 3, 5, 10)


def print_acceptance(body: dict[str, Any]) -> None:
    title = f"{counted(body['prompts'], 'prompt')}, {counted(body['positions'], 'position')}"
    heads = Table("head", "token", *(f"top {k}" for k in SHOWN), "top 1, 95% CI", title=title, title_justify="left")
    for head, row in enumerate(body["heads"]):
        low, high = row["top1_ci95"]
        cells = (f"{row[f'top{k}']:.1%}" for k in SHOWN)
        heads.add_row(str(head), f"t+{head + 2}", *cells, f"{low:.1%} .. {high:.1%}")
    stdout.print(heads)
    if len(body["categories"]) > 1:
        heads_shown = (f"head {head}" for head in range(len(body["heads"])))
        table = Table("category", "prompts", *heads_shown, title="top 1", title_justify="left")
        for row in body["categories"]:
            table.add_row(row["category"], str(row["prompts"]), *(f"{value:.1%}" for value in row["top1"]))
        stdout.print(table)
    tree = body["tree"]
    best = counted(len(tree["choices"]), "draft token")
    stdout.print(f"tokens per step with the best tree of {best}: {tree['tokens_per_step']:.2f}")


def print_cost(curve: dict[str, Any]) -> None:
    title = f"batch {curve['batch']}, {curve['past_length']} tokens in the cache"
    table = Table("nodes", "ms", "95% CI", "ratio", "outliers", title=title, title_justify="left")
    base = curve["verify"][0]["ms"]
    for name, key in (("verify", "nodes"), ("draft", "depth")):
        for row in curve[name]:
            low, high = row["ci95"]
            label = str(row[key]) if name == "verify" else f"{row[key]} heads"
            cells = (
                f"{row['ms']:.2f}",
                f"{low:.2f} .. {high:.2f}",
                f"{row['ms'] / base:.3f}",
                f"{row['outliers']} of {row['runs']}",
            )
            table.add_row(label, *cells, end_section=name == "verify" and row is curve[name][-1])
    stdout.print(table)


def print_search(found: Any) -> None:
    from medusa_export.engines.bench.speeds import interval_text, times_text

    table = Table("draft tokens", "depth", "tokens per step", "cost", "predicted", "measured")
    ran = {item.tree: item for item in found.measured}
    near = sorted(found.sizes, key=lambda item: -item.speedup)[:5]
    shown = [
        item for item in found.sizes if item in near or item.tree in ran or item in (found.sizes[0], found.sizes[-1])
    ]
    for item in shown:
        run = ran.get(item.tree)
        interval = f" ({interval_text(run.interval)})" if run and run.interval else ""
        measured = f"{times_text(run.speedup)}{interval}" if run else ""
        cells = (str(item.tree.max_draft_len), str(item.tree.depth), f"{item.tokens_per_step:.2f}")
        style = "bold" if item is found.chosen or item.tree == found.chosen.tree else None
        table.add_row(*cells, f"{item.cost_ratio:.2f}", f"{item.speedup:.2f}x", measured, style=style)
    stdout.print(table)


def print_crossover(rows: list[dict[str, Any]]) -> None:
    """A line a batch and context: the best tree, and what the model does without heads."""
    others = list(dict.fromkeys(name for row in rows for name in row.get("alternatives", ())))
    estimated = [row for row in rows if "estimated" in row]
    mixed = 0 < len(estimated) < len(rows)
    gpus = ", ".join(dict.fromkeys(row["estimated"] for row in estimated))
    origin = f"costs estimated for {gpus}, not measured" if estimated else "costs measured"
    origin = f"costs measured, or with * estimated for {gpus}" if mixed else origin
    title = f"best tree by batch and context; tokens/s of the whole batch; {origin}"
    stacked = (name.replace(" without Medusa", "\nalone") for name in others)
    names = ("batch", "past\nlength", "draft\ntokens", "tokens\na step", "gain", "interval", "tokens/s", *stacked)
    table = narrow_table(*names, title=title)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        interval = row["speedup_interval"]
        spread = f"{interval[0]:.2f}-{interval[1]:.2f}" if interval and row["max_draft_len"] else ""
        mark = "*" if mixed and "estimated" in row else ""
        table.add_row(
            f"{row['batch']}{mark}", str(row["past_length"]), str(row["max_draft_len"] or "no tree"),
            f"{row['tokens_per_step']:.2f}", f"{row['speedup']:.2f}x", spread, f"{row['tokens_per_second']:.0f}",
            *(f"{speed:.0f}" if (speed := row.get("alternatives", {}).get(name)) is not None else "-" for name in others),
            end_section=following is not None and following["batch"] != row["batch"],
        )  # fmt: skip
    stdout.print(table)


def narrow_table(*names: str, title: str) -> Table:
    """A table of many numbers in 80 columns: no lines between columns, nothing folded within a cell."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table
