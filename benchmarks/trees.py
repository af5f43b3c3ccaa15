"""The chosen tree against the best tree of every size, all of them run: interleaved, on prompts that it was not chosen on.

    python benchmarks/trees.py quickstart/out/engine --prompts examples/spec_bench_39.jsonl --limit 26

The trees come from the acceptance.json and cost.json that ``medusa-export --prompts`` left in the engine's directory.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from medusa_export.core.text.prompts import load_prompts
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.backends import open_engine
from medusa_export.engines.measure.machine import hardware, versions
from medusa_export.engines.measure.prompts import encode_prompts
from medusa_export.engines.measure.side_by_side import Measured, compare
from medusa_export.engines.tuning.search import search
from medusa_export.heads.contract.engine_info import TREE_FILE
from medusa_export.heads.trees.acceptance import ACCEPTANCE_FILE, Acceptance
from medusa_export.heads.trees.search import Candidate
from medusa_export.heads.trees.step_costs import COST_FILE, cost_curve, load_costs
from medusa_export.heads.trees.tree import Tree, load_tree

FIXED = "medusa-63"


def main(
    engine_dir: Annotated[Path, typer.Argument(help="Engine directory of an export with --prompts.")],
    prompts: Annotated[Path, typer.Option(help="JSONL.")],
    limit: Annotated[int | None, typer.Option(help="Only the first so many prompts.")] = None,
    max_nodes: Annotated[int, typer.Option(help="The largest size that is run.")] = 32,
    max_new_tokens: int = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Print the speed of every size's tree, and where the chosen one stands."""
    engine = open_engine(engine_dir)
    counted = Acceptance.load(engine_dir / ACCEPTANCE_FILE)
    sizes = search(counted, cost_curve(load_costs(engine_dir / COST_FILE)[0]), max_draft_len=max_nodes - 1).sizes[1:]
    chosen, fixed = load_tree(str(engine_dir / TREE_FILE)), load_tree(FIXED, num_medusa_heads=engine.info.max_depth)
    encoded = encode_prompts(
        read_tokenizer(engine_dir), engine.info, load_prompts(prompts, limit), max_new_tokens=max_new_tokens
    )
    trees = [candidate.tree for candidate in sizes]
    extra = [tree for tree in (chosen, fixed) if tree not in trees]
    measured = compare(engine, [*trees, *extra], [ids for _, _, ids in encoded], max_new_tokens=max_new_tokens)
    by_tree = {item.tree: item for item in measured}
    speeds = {item.tree: item.speedup for item in measured if item.speedup is not None}
    if not speeds:
        raise SystemExit("every answer has one token: nothing was decoded")
    best = max(speeds, key=lambda tree: speeds[tree])
    speed = speeds.get(chosen, 1.0)
    console = Console()
    console.print(_table(by_tree, {candidate.tree: candidate for candidate in sizes}, chosen))
    console.print(
        f"chosen: {speed:.3f}x, {speed / speeds[best]:.3f} of the best, {best.max_draft_len} draft tokens; "
        f"{speed / speeds[fixed]:.2f} times {FIXED} with {speeds[fixed]:.3f}x"
    )
    if json_file:
        rows = [{**asdict(item), "tree": [list(choice) for choice in item.tree.choices]} for item in measured]
        body = {"rows": rows, "chosen": speed, "hardware": hardware(), "versions": versions()}
        json_file.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def _table(measured: dict[Tree, Measured[Tree]], predicted: dict[Tree, Candidate], chosen: Tree) -> Table:
    table = Table("draft tokens", "depth", "tokens per step", "predicted", "measured", "95% CI")
    for tree, item in sorted(measured.items(), key=lambda pair: pair[0].max_draft_len):
        candidate = predicted.get(tree)
        interval = "{:.3f} .. {:.3f}".format(*item.interval) if item.interval else "-"
        cells = (f"{item.tokens_per_step or 1:.3f}", f"{candidate.speedup:.3f}" if candidate else "")
        style = "bold" if tree == chosen else None
        table.add_row(
            str(tree.max_draft_len),
            str(tree.depth),
            *cells,
            f"{item.speedup:.3f}",
            interval,
            style=style,
        )
    return table


if __name__ == "__main__":
    typer.run(main)
