"""How far an engine's logits depend on how many rows it computes at once: what greedy decoding with and without drafts can differ by.

python benchmarks/rows.py quickstart/out/engine
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from medusa_export.core.text.prompts import load_prompts
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.measure.prompts import encode_prompts
from medusa_export.engines.onnxruntime.batch_engine import TreeBatchDecoder
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine

PROMPTS = Path(__file__).resolve().parent.parent / "examples" / "spec_bench_39.jsonl"
TOKENS, CHUNKS = 24, (1, 2, 4, 8)
BATCH = "1, the graph of many sequences"


def logits(engine_dir: Path, engine: OnnxRuntimeEngine, input_ids: Sequence[int]) -> Iterator[tuple[str, np.ndarray]]:
    """Next-token logits of a text's last tokens, computed in several ways.  # [TOKENS, vocab_size]"""
    start = len(input_ids) - TOKENS
    for chunk in CHUNKS:
        yield str(chunk), np.concatenate(list(engine.score(input_ids, chunk=chunk, start=start)))
    batch = TreeBatchDecoder(engine_dir, slots=1)
    batch.admit(input_ids[:start])
    yield BATCH, np.stack([batch.step([token])[0].copy() for token in input_ids[start:]])


def main(
    engine_dir: Annotated[Path, typer.Argument(help="Engine directory of an export.")],
    limit: Annotated[int, typer.Option(help="Prompts, whose own last tokens are scored.", min=1)] = 5,
) -> None:
    """Print the table: against one row at a time."""
    engine = OnnxRuntimeEngine(engine_dir)
    prompts = encode_prompts(read_tokenizer(engine_dir), engine.info, load_prompts(PROMPTS, limit), max_new_tokens=1)
    found: dict[str, list[tuple[float, int]]] = {}
    for _, _, input_ids in prompts:
        ways = dict(logits(engine_dir, engine, input_ids))
        first = ways[str(CHUNKS[0])]
        for name, other in ways.items():
            same = int((first.argmax(-1) == other.argmax(-1)).sum())
            found.setdefault(name, []).append((float(np.abs(first - other).max()), same))
    table = Table("rows at once", "largest difference of a logit", "same next token", title=engine.info.precision)
    for name, each in found.items():
        total = f"{sum(same for _, same in each)} of {TOKENS * len(each)}"
        table.add_row(name, f"{max(difference for difference, _ in each):.2g}", total)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
