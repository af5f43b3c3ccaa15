"""A served engine under load (tritonserver, medusa-serve): throughput, latencies, memory, every answer compared with offline ones.

    python benchmarks/serving.py ENGINE --prompts examples/spec_bench_39.jsonl --json serving.json
    python benchmarks/serving.py ENGINE --prompts examples/spec_bench_39.jsonl --server openai --streams 16 --minutes 10

Server and clients share this machine, on its loopback. ``--cancel 0.3`` has three of ten clients give up at a random token.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))  # this folder is no package

from serving_client import Answer, Load, Question, run_load, summary
from serving_memory import MemoryLog
from serving_servers import SERVERS, Running

from medusa_export.core.errors import ConfigError
from medusa_export.core.text.prompts import load_prompts
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.decoding.generate import generate
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE, Generation
from medusa_export.engines.measure.machine import hardware, versions
from medusa_export.engines.measure.prompts import encode_prompts
from medusa_export.engines.onnxruntime.batch_engine import TreeBatchDecoder
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.engines.serving.options import ServingOptions
from medusa_export.engines.verify.parity import explain, first_divergence, verdict
from medusa_export.heads.trees.tree import Tree, load_tree

NONE, ENGINE = "none", "engine"  # besides files, what --tree may be
NOISE_PROMPTS = 8


def main(
    engine_dir: Annotated[Path, typer.Argument(help="Engine directory of an export for ONNX Runtime.")],
    prompts: Annotated[Path, typer.Option(help="JSONL; asked in turn.")],
    streams: Annotated[list[int], typer.Option(help="Requests at once. Can be repeated.")] = [1, 8, 32, 128],  # noqa: B006
    tree: Annotated[
        list[str],
        typer.Option(help="none, engine (what the server drafts by itself), or a tree.json. Can be repeated."),
    ] = [NONE, ENGINE],  # noqa: B006
    requests: Annotated[int | None, typer.Option(help="Of each load. Default: 24, or two a stream.")] = None,
    server: Annotated[str, typer.Option(help="triton, or openai: medusa-serve.")] = "triton",
    max_new_tokens: int = 64,
    limit: Annotated[int | None, typer.Option(help="Only the first so many prompts.")] = None,
    max_batch: Annotated[int, typer.Option(help="Requests that the server decodes at once.")] = 32,
    cancel: Annotated[float, typer.Option(help="Part of the clients that give up.")] = 0.0,
    minutes: Annotated[float | None, typer.Option(help="Instead of a number of requests; the first load only.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Serve an engine, ask it from many clients at once, and print what they saw."""
    if server not in SERVERS:
        raise typer.BadParameter(f"{server}; expected one of {', '.join(SERVERS)}", param_hint="--server")
    if minutes is not None:
        streams, tree = streams[:1], tree[:1]
    questions, judge = _offline(engine_dir, prompts, limit, max_new_tokens)
    options = ServingOptions(max_batch=max_batch, tree_max_batch=max_batch, timeout_s=3600)
    loads = [
        Load(
            count, requests or max(24, 2 * count), max_new_tokens, cancel=cancel,
        )
        for count in streams
    ]  # fmt: skip
    if minutes is not None:
        loads = [replace(loads[0], requests=sys.maxsize, seconds=60 * minutes)]
    rows, console, tools = [], Console(), dict[str, str]()
    for name in tree:
        with _served(server, engine_dir, name, options) as running:
            tools |= running.versions
            rows += [{"tree": name, **_measure(running, questions, load, judge)} for load in loads]
    console.print(_table(rows))
    for row in rows:
        for message in row["messages"]:
            console.print(f"{row['tree']}, {row['streams']} streams: {message}", markup=False)
    if minutes is not None:
        console.print(_memory_line(rows[0]["memory"]))
    if json_file:
        arguments = {
            "server": server, "prompts": len(questions), "max_new_tokens": max_new_tokens, "cancel": cancel, **options.as_text(),
        }  # fmt: skip
        body = {"rows": rows, "arguments": arguments, "hardware": hardware(), "versions": versions() | tools}
        json_file.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def _offline(
    engine_dir: Path, prompts: Path, limit: int | None, max_tokens: int
) -> tuple[list[Question], Callable[[Answer], str]]:
    """The questions with medusa-run's answers, and what says why a served answer differs: a near tie, or not."""
    engine, tokenizer, loaded = OnnxRuntimeEngine(engine_dir), read_tokenizer(engine_dir), load_prompts(prompts, limit)
    questions = []
    for prompt, (key, _, ids) in zip(
        loaded, encode_prompts(tokenizer, engine.info, loaded, max_new_tokens=max_tokens), strict=True
    ):
        if [message["role"] for message in prompt.messages] not in (["user"], ["system", "user"]):
            raise ConfigError(f"prompt {key}", "a longer conversation", "one question", "leave it out")
        tokens = _decode(engine, ids, max_tokens)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        questions.append(Question(key, [dict(message) for message in prompt.messages], ids, tokens, text))

    @cache
    def noise() -> float:
        return _noise(engine, engine_dir, questions[:NOISE_PROMPTS])

    verdicts: dict[tuple[Any, ...], str] = {}  # by where an answer parts from ours, and with what

    def judge(answer: Answer) -> str:
        ours, served = (Generation(tokens, "") for tokens in (answer.question.tokens, answer.tokens))
        at = first_divergence(ours, served)
        if at is None:  # the same tokens, another text
            return "mismatch"
        key = (answer.question.id, at, *served.tokens[at : at + 1])
        if key not in verdicts:
            verdicts[key] = verdict(explain(engine, answer.question.input_ids, ours, served), noise())
        return verdicts[key]

    return questions, judge


def _noise(engine: OnnxRuntimeEngine, engine_dir: Path, questions: Sequence[Question]) -> float:
    """How much the gap between the best two tokens moves between medusa-run's graph and the server's, on the same text, in logits."""
    largest = 0.0
    for question in questions:
        server = TreeBatchDecoder(engine_dir, slots=1)
        rows = [server.admit(question.input_ids)]
        rows += [server.step([token])[0].copy() for token in question.tokens[:-1]]
        text, start = [*question.input_ids, *question.tokens[:-1]], len(question.input_ids) - 1
        ours = np.concatenate(list(engine.score(text, chunk=1, start=start)))
        best_two = np.argpartition(ours, -2, axis=-1)[:, -2:]  # [answer, 2]
        gaps = [np.diff(np.take_along_axis(logits, best_two, axis=-1), axis=-1) for logits in (ours, np.stack(rows))]
        largest = max(largest, float(np.abs(gaps[0] - gaps[1]).max()))
    return largest


def _decode(engine: OnnxRuntimeEngine, input_ids: Sequence[int], max_tokens: int) -> list[int]:
    eos = engine.info.eos_token_ids
    return generate(engine, input_ids, AUTOREGRESSIVE, max_new_tokens=max_tokens, eos_token_ids=eos).tokens


@contextmanager
def _served(server: str, engine_dir: Path, tree: str, options: ServingOptions) -> Iterator[Running]:
    """A server that uses a tree of ``--tree``."""
    with tempfile.TemporaryDirectory(prefix="medusa-serving-") as folder:
        file = None
        if tree == NONE:
            file = Path(folder) / "tree.json"
            file.write_text(Tree(()).to_json())
        elif tree != ENGINE:
            load_tree(tree)
            file = Path(tree)
        with SERVERS[server](engine_dir, file, options, Path(folder)) as running:
            yield running


def _measure(running: Running, questions: list[Question], load: Load, judge: Callable[[Answer], str]) -> dict[str, Any]:
    async def ask(load: Load) -> tuple[list[Answer], float]:
        async with running.connect() as client:
            return await run_load(client, questions, load)

    asyncio.run(ask(replace(load, requests=min(load.streams, 8), max_tokens=4, seconds=float("inf"), cancel=0)))
    with MemoryLog(running.processes, lambda text: print(text, file=sys.stderr, flush=True)) as memory:
        cpu = time.process_time()
        answers, seconds = asyncio.run(ask(load))
        cpu = time.process_time() - cpu
    for answer in answers:
        running.complete(answer)
    row = summary(answers, seconds, judge)
    return {"streams": load.streams, **row, "client_cores": round(cpu / seconds, 2), "memory": memory.summary()}


def _memory_line(memory: dict[str, Any]) -> str:
    first, last = (memory[name]["all"] for name in ("first_minute_mb", "last_minute_mb"))
    slope = memory.get("slope_mb_per_minute")
    return f"memory, all processes: {first} MB in the first minute, {last} MB in the last" + (
        f", {slope:+} MB a minute after the first" if slope is not None else ""
    )


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table("tree", "streams", "tokens/s", "TTFT ms p50 / p99", "between tokens ms p50 / p99", "longest pauses ms p99",
                  "tokens per step", "ended", "busy", "errors, lost, mixed up", "exact / ties / mismatches", "memory MB")  # fmt: skip
    for row in rows:
        times = [
            row[name] or {"p50": float("nan"), "p99": float("nan")}
            for name in ("time_to_first_token_ms", "inter_token_ms")
        ]
        table.add_row(
            Path(row["tree"]).name, str(row["streams"]), f"{row['tokens_per_second']:.1f}",
            *(f"{each['p50']:.0f} / {each['p99']:.0f}" for each in times),
            f"{row['pause_ms']['p99']:.0f}" if row["pause_ms"] else "", f"{row['tokens_per_step'] or 0:.2f}",
            f"{row['ok']}" + (f" + {row['cancelled']} cancelled" if row["cancelled"] else ""), str(row["busy"]),
            ", ".join(str(row[name]) for name in ("error", "lost", "mixed up")),
            " / ".join(str(row[name]) for name in ("exact", "tie", "mismatch")),
            f"{row['memory']['last_minute_mb']['all']:.0f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the server goes too
    typer.run(main)
