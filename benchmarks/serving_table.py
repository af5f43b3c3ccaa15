"""Which engine to serve with: speed by engine form and number of streams, with and without drafts, beside other servers.

    python benchmarks/serving_table.py fp8=out/engine int8_wo=out-int8/engine --checkpoint CHECKPOINT \\
        --peer llama.cpp --peer transformers

Every side is a server of its own, and all stand ready from the beginning. They are asked in turns, one at a time, for equal
times: the table is done when ``--minutes`` are over, and what else a machine does at a time meets all of them. Server and
clients share the machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

sys.path.insert(0, str(Path(__file__).parent))  # this folder is no package

from peer_models import UnavailableError
from serving_client import Answer, Load, Question, run_load, summary
from serving_peers import PEERS, Place
from serving_servers import Running, openai

from medusa_export.core.text.prompts import load_prompts
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.measure.machine import hardware, versions
from medusa_export.engines.measure.prompts import encode_prompts
from medusa_export.engines.serving.options import ServingOptions
from medusa_export.heads.contract.engine_info import EngineInfo

PROMPTS = Path(__file__).resolve().parent.parent / "examples" / "spec_bench_39.jsonl"
DRAFTS = ("auto", "none")  # what medusa-serve does by itself, and without any
LEAST_SECONDS = 2.0  # of a turn
SETTLE_SECONDS, POLL_SECONDS, QUIET = (
    20.0,
    0.2,
    0.1,
)  # how long a server may go on with what was given up; cores that are none
TICKS = os.sysconf("SC_CLK_TCK")

Start = Callable[[], AbstractContextManager[Running]]


@dataclass
class Cell:
    """What one side did with one number of streams.

    Attributes:
        seconds: of its turns together.
        rates: tokens per second of each turn.
    """

    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0
    rates: list[float] = field(default_factory=list)

    def add(self, answers: list[Answer], seconds: float) -> None:
        """One turn more."""
        self.answers += answers
        self.seconds += seconds
        self.rates.append(sum(len(answer.tokens) for answer in answers) / seconds)


def main(
    engines: Annotated[list[str], typer.Argument(help="NAME=DIRECTORY of engines of one checkpoint.")],
    checkpoint: Annotated[Path, typer.Option(help="The checkpoint, for the peers.")],
    peer: Annotated[list[str], typer.Option(help=f"{', '.join(PEERS)}. Can be repeated.")] = [],  # noqa: B006
    prompts: Annotated[Path, typer.Option(help="JSONL; asked in turn.")] = PROMPTS,
    streams: Annotated[list[int], typer.Option(help="Requests at once. Can be repeated.")] = [1, 4, 16],  # noqa: B006
    minutes: Annotated[float, typer.Option(help="For everything.")] = 9.5,
    rounds: Annotated[int, typer.Option(help="Turns of each side with each number of streams.", min=1)] = 2,
    max_new_tokens: int = 64,
    limit: Annotated[int | None, typer.Option(help="Only the first so many prompts.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of each server; all cores unless given.")] = None,
    llama_server: Annotated[Path | None, typer.Option(help="A llama-server to use instead of building one.")] = None,
    work: Annotated[Path, typer.Option(help="Where the peers' models are kept.")] = Path("quickstart/peers"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Print the table, in Markdown."""
    if unknown := sorted(set(peer) - PEERS.keys()):
        raise typer.BadParameter(f"{unknown[0]}; expected one of {', '.join(PEERS)}", param_hint="--peer")
    deadline = time.monotonic() + 60 * minutes
    named = {name: Path(directory) for name, _, directory in (text.rpartition("=") for text in engines)}
    questions, context = _questions(next(iter(named.values())), prompts, limit, max_new_tokens)
    cores, machine = threads or len(os.sched_getaffinity(0)), hardware()
    work.mkdir(parents=True, exist_ok=True)
    place = Place(checkpoint, work.resolve(), max(streams), context, cores, llama_server)
    with tempfile.TemporaryDirectory(prefix="medusa-serving-") as folder, ExitStack() as stack:
        sides, absent, tools = _open(stack, _sides(named, peer, place, Path(folder)))
        loads = [Load(count, sys.maxsize, max_new_tokens, cuts=True) for count in streams]
        cells = race(sides, questions, loads, rounds, deadline)
    rows = [
        {"side": name, "streams": count, "rates": [round(rate, 2) for rate in cell.rates],
         **summary(cell.answers, cell.seconds, lambda answer: "not compared")}
        for (name, count), cell in cells.items()
    ]  # fmt: skip
    print("\n".join(markdown(rows, streams)))
    for name, why in absent.items():
        print(f"{name}: absent, {why}")
    for row in rows:
        if row["error"] or row["lost"] or row["busy"]:
            print(f"{row['side']}, {row['streams']} streams: {row['error']} errors, {row['lost']} lost, {row['busy']} busy;",
                  *row["messages"][:1])  # fmt: skip
    if json_file:
        body = {"rows": rows, "absent": absent, "threads": cores, "hardware": machine, "versions": versions() | tools}
        json_file.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def _questions(engine: Path, prompts: Path, limit: int | None, max_tokens: int) -> tuple[list[Question], int]:
    """The prompts, without answers to compare with; and the most tokens that one takes with its answer."""
    tokenizer, loaded = read_tokenizer(engine), load_prompts(prompts, limit)
    encoded = encode_prompts(tokenizer, EngineInfo.load(engine), loaded, max_new_tokens=max_tokens)
    questions = [
        Question(key, [dict(message) for message in prompt.messages], ids, [], "")
        for prompt, (key, _, ids) in zip(loaded, encoded, strict=True)
    ]
    return questions, max(len(question.input_ids) for question in questions) + max_tokens


def _sides(engines: Mapping[str, Path], peers: Sequence[str], place: Place, folder: Path) -> dict[str, Start]:
    """How each side is started, by its name in the table."""
    options = ServingOptions(max_batch=place.streams, timeout_s=3600, threads=place.threads)

    def ours(engine: Path, drafts: str, own: Path) -> Start:
        own.mkdir()
        return lambda: openai(engine, None, replace(options, drafts=drafts), own)

    found = {
        f"{name}, drafts {drafts}": ours(engine, drafts, folder / f"{number}-{drafts}")
        for number, (name, engine) in enumerate(engines.items())
        for drafts in DRAFTS
    }
    return found | {name: partial(PEERS[name], place) for name in peers}


def _open(stack: ExitStack, sides: Mapping[str, Start]) -> tuple[dict[str, Running], dict[str, str], dict[str, str]]:
    """The servers that run, why others do not, and versions."""
    running, absent, tools = dict[str, Running](), dict[str, str](), dict[str, str]()
    for name, start in sides.items():
        print(f"starting {name}", file=sys.stderr, flush=True)
        try:
            running[name] = stack.enter_context(start())
            tools |= running[name].versions
        except UnavailableError as error:
            absent[name] = str(error)
    return running, absent, tools


def race(
    sides: Mapping[str, Running], questions: list[Question], loads: Sequence[Load], rounds: int, deadline: float
) -> dict[tuple[str, int], Cell]:
    """Every side with every load, in turns. A turn is as long as fits, and no server still works when the next one is asked."""
    names = list(sides)
    cells = {(name, load.streams): Cell() for name in names for load in loads}
    for name in names:
        ask(sides[name], questions, replace(loads[0], streams=1, requests=1, max_tokens=4, cuts=False))
    turns = [(number, load) for number in range(rounds) for load in loads]
    left = len(turns) * len(names)
    for number, load in turns:
        shift = number * len(names) // rounds
        for name in [*names[shift:], *names[:shift]]:
            settle(sides[name])
            seconds = max(LEAST_SECONDS, (deadline - time.monotonic()) / left - POLL_SECONDS)
            cells[name, load.streams].add(*ask(sides[name], questions, replace(load, seconds=seconds)))
            settle(sides[name])
            left -= 1
            print(
                f"{name}, {load.streams} streams: {cells[name, load.streams].rates[-1]:.1f} tokens/s", file=sys.stderr
            )
    return cells


def ask(running: Running, questions: list[Question], load: Load) -> tuple[list[Answer], float]:
    """Put a load on a server that runs. Returns the answers and the seconds."""

    async def asked() -> tuple[list[Answer], float]:
        async with running.connect() as client:
            return await run_load(client, questions, load)

    return asyncio.run(asked())


def settle(running: Running) -> None:
    """Wait until a server has stopped working on what its clients have given up."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline:
        before = _cpu_seconds(running)
        time.sleep(POLL_SECONDS)
        if _cpu_seconds(running) - before < QUIET * POLL_SECONDS:
            return


def _cpu_seconds(running: Running) -> float:
    total = 0
    for pid in (pid for ids in running.processes().values() for pid in ids):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def markdown(rows: Sequence[Mapping[str, Any]], streams: Sequence[int]) -> Iterator[str]:
    """The table: a line a side, a column a number of streams, with tokens/s, first token and between tokens in it."""
    found = {(row["side"], row["streams"]): row for row in rows}
    yield (
        "| tokens/s; first token, between tokens, ms (medians) | "
        + " | ".join(f"{count} stream{'s' * (count > 1)}" for count in streams)
        + " |"
    )
    yield "|---" * (len(streams) + 1) + "|"
    for side in dict.fromkeys(row["side"] for row in rows):
        cells = []
        for count in streams:
            row = found[side, count]
            first, between = (row[name] and row[name]["p50"] for name in ("time_to_first_token_ms", "inter_token_ms"))
            times = ", ".join("none" if value is None else f"{value:.0f}" for value in (first, between))
            cells.append(f"{row['tokens_per_second']:.1f}; {times}")
        yield f"| {side} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the servers go too
    typer.run(main)
