"""Autoregressive steps of the engine against other engines on the same weights, prompts and cores, interleaved.

    medusa-export --ckpt quickstart/model --heads examples/smollm2-135m-medusa-v2 --quant none --output /tmp/float
    medusa-export --ckpt quickstart/model --heads examples/smollm2-135m-medusa-v2 --quant int8_wo --output /tmp/int8
    python benchmarks/peers.py quickstart/model --float32 /tmp/float/engine --int8 /tmp/int8/engine

Every contender is a process (``peer_engines.py``), and only one works at a time. They take turns of a few steps; the first step of
a turn, which wakes threads up, is not counted. The same engine started several times differs by up to 15 %, for as long as its
process lives, and the one that started first was the slowest (three runs of seven to nine processes). So the prompts are dealt to
several rounds, and in each all contenders start anew, in another order. Models are made once, under ``--work``, by the contenders'
own tools.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import peer_models as models
import typer
from rich.console import Console
from rich.table import Table

from medusa_export.core.intervals import median_interval
from medusa_export.core.text.prompts import load_prompts
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.measure.machine import hardware, versions
from medusa_export.engines.measure.prompts import encode_prompts
from medusa_export.heads.contract.engine_info import EngineInfo

WORKER = Path(__file__).with_name("peer_engines.py")
PROMPTS = Path(__file__).resolve().parent.parent / "examples" / "spec_bench_39.jsonl"
OURS = "medusa-export"
STEPS_A_TURN = 16


@dataclass(frozen=True)
class Place:
    """Where the models of a group come from and go."""

    engine: Path
    checkpoint: Path
    work: Path

    def made(self, name: str, make: Callable[..., None], *arguments: Any) -> Path:
        return models.made_once(self.work / name, lambda out: make(self.checkpoint, out, *arguments))


@dataclass
class Figures:
    """What one contender did: tokens and milliseconds of every prompt."""

    tokens: list[list[int]] = field(default_factory=list)
    ms: list[list[float]] = field(default_factory=list)

    def add(self, other: Figures) -> None:
        """Those of further prompts."""
        self.tokens += other.tokens
        self.ms += other.ms


# Name -> (worker's name, Python, model). What raises UnavailableError is reported as absent.
Entry = tuple[str, Path, Path]
HERE = Path(sys.executable)


def _gguf(place: Place, quantization: str) -> Entry:
    return "llama.cpp", HERE, place.made(f"{quantization}.gguf", models.gguf_file, quantization)


def _openvino(place: Place, worker: str, weights: str) -> Entry:
    python = models.environment(place.work)
    return worker, python, place.made(f"openvino-{weights}", models.openvino_model, python, weights)


def _genai(place: Place, precision: str) -> Entry:
    python = models.environment(place.work)
    return "onnxruntime-genai", python, place.made(f"genai-{precision}", models.genai_model, python, precision)


GROUPS: dict[str, dict[str, Callable[[Place], Entry]]] = {
    "float32": {
        OURS: lambda place: ("ours", HERE, place.engine),
        "transformers": lambda place: ("transformers", HERE, place.checkpoint),
        "torch.compile": lambda place: ("torch.compile", HERE, place.checkpoint),
        "llama.cpp F32": partial(_gguf, quantization="F32"),
        "OpenVINO f32": partial(_openvino, worker="openvino-f32", weights="fp32"),
        "onnxruntime-genai fp32": partial(_genai, precision="fp32"),
    },
    "8-bit": {
        OURS: lambda place: ("ours", HERE, place.engine),
        "llama.cpp Q8_0": partial(_gguf, quantization="Q8_0"),
        "OpenVINO int8": partial(_openvino, worker="openvino", weights="int8"),
        "onnxruntime-genai int8": partial(_genai, precision="int8"),
    },
}


class Worker:
    """A contender's process."""

    def __init__(self, entry: Entry, threads: int, max_length: int, log: Path) -> None:
        name, python, model = entry
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [str(python), str(WORKER), name, str(model), str(threads), str(max_length)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1,
            )  # fmt: skip
        self._answer()

    def ask(self, **request: Any) -> tuple[list[int], list[float]]:
        """Tokens and milliseconds.

        Raises:
            UnavailableError: what went wrong over there.
        """
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
        except BrokenPipeError as error:
            raise models.UnavailableError("its process ended") from error
        return self._answer()

    def _answer(self) -> tuple[list[int], list[float]]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        body: dict[str, Any] = json.loads(line) if line else {"error": f"its process ended with {self._process.wait()}"}
        if "error" in body:
            raise models.UnavailableError(body["error"].splitlines()[0])
        return body["tokens"], body["ms"]

    def stop(self) -> None:
        self._process.communicate()


def start(
    group: Mapping[str, Callable[[Place], Entry]], place: Place, threads: int, max_length: int
) -> tuple[dict[str, Worker], dict[str, str]]:
    """The contenders that there are, warm, and why the others are absent."""
    workers: dict[str, Worker] = {}
    absent: dict[str, str] = {}
    for name, entry in group.items():
        log = place.work / f"{name.replace(' ', '-')}.log"
        try:
            worker = Worker(entry(place), threads, max_length, log)
            for _ in range(2):  # some compile in the first round, and some err in the second
                worker.ask(prefill=[1] * 8, steps=STEPS_A_TURN)
            workers[name] = worker
        except (models.UnavailableError, ImportError) as error:
            absent[name] = str(error)
    return workers, absent


def race(
    workers: Mapping[str, Worker], prompts: Sequence[list[int]], new_tokens: int
) -> tuple[dict[str, Figures], dict[str, str]]:
    """Every prompt by every contender, in turns of a few steps and rotating order; and who dropped out, and why."""
    figures = {name: Figures() for name in workers}
    dropped: dict[str, str] = {}

    def ask(name: str, **request: Any) -> tuple[list[int], list[float]]:
        try:
            return workers[name].ask(**request)
        except models.UnavailableError as error:
            if name == OURS:
                raise
            dropped[name] = str(error)
            del figures[name]
            return [], []

    turn = 0
    for ids in prompts:
        for name in list(figures):
            tokens, _ = ask(name, prefill=ids)
            if name in figures:
                figures[name].tokens.append(tokens)
                figures[name].ms.append([])
        left = new_tokens - 1
        while left:
            steps, turn, names = min(left, STEPS_A_TURN), turn + 1, list(figures)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                tokens, times = ask(name, steps=steps)
                if name in figures:
                    figures[name].tokens[-1] += tokens
                    figures[name].ms[-1] += times[1:]
            left -= steps
    return figures, dropped


def all_rounds(
    begin: Callable[[list[str]], tuple[dict[str, Worker], dict[str, str]]],
    names: Sequence[str],
    prompts: Sequence[list[int]],
    new_tokens: int,
    rounds: int,
) -> tuple[dict[str, Figures], dict[str, str]]:
    """Every prompt in one of the rounds, by processes of that round alone.

    Args:
        begin: starts contenders in the given order; also says why some are absent, from then on.
    """
    figures: dict[str, Figures] = {name: Figures() for name in names}
    absent: dict[str, str] = {}
    for number in range(rounds):
        shift = number * len(names) // rounds
        workers, missing = begin([name for name in [*names[shift:], *names[:shift]] if name not in absent])
        try:
            found, dropped = race(workers, prompts[number::rounds], new_tokens)
        finally:
            for worker in workers.values():
                worker.stop()
        absent |= missing | dropped
        for name, part in found.items():
            figures[name].add(part)
    return {name: found for name, found in figures.items() if name not in absent}, absent


def summary(figures: Mapping[str, Figures]) -> dict[str, dict[str, Any]]:
    """Medians over prompts of each prompt's median step, with 95 % intervals. Ratios are medians of pairs, above 1 if slower."""
    rows = {}
    ours = [median(times) for times in figures[OURS].ms]
    for name, found in figures.items():
        steps = [median(times) for times in found.ms]
        ratios = [theirs / mine for theirs, mine in zip(steps, ours, strict=True)]
        pooled = sorted(ms for times in found.ms for ms in times)
        rows[name] = {
            "step_ms": median(steps),
            "step_ms_ci95": median_interval(steps),
            "fastest_tenth_ms": pooled[len(pooled) // 10],
            "ratio": median(ratios),
            "ratio_ci95": median_interval(ratios),
            "equal": sum(a == b for a, b in zip(found.tokens, figures[OURS].tokens, strict=True)),
        }
    return rows


def main(
    checkpoint: Annotated[Path, typer.Argument(help="The Hugging Face checkpoint.")],
    float32: Annotated[Path | None, typer.Option(help="An engine of it, exported with --quant none.")] = None,
    int8: Annotated[Path | None, typer.Option(help="An engine of it, exported with --quant int8_wo.")] = None,
    prompts: Annotated[Path, typer.Option(help="JSONL.")] = PROMPTS,
    limit: Annotated[int, typer.Option(help="Prompts.")] = 13,
    rounds: Annotated[int, typer.Option(help="Times that all processes start anew.", min=1)] = 3,
    new_tokens: Annotated[int, typer.Option(help="Tokens a prompt; the end of sequence is ignored.", min=3)] = 64,
    threads: Annotated[int | None, typer.Option(help="Of every contender; all cores unless given.")] = None,
    contender: Annotated[list[str] | None, typer.Option(help="Only these, by their names in the table.")] = None,
    work: Annotated[Path, typer.Option(help="Where models and an environment are kept.")] = Path("quickstart/peers"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Print step latencies of every contender, and their ratios to this engine's."""
    work.mkdir(parents=True, exist_ok=True)
    machine = hardware()
    cores = threads or int(machine["cores"])
    body: dict[str, Any] = {"hardware": machine, "versions": versions(), "threads": cores, "groups": {}}
    for group, engine in {"float32": float32, "8-bit": int8}.items():
        if engine is None:
            continue
        encoded = encode_prompts(
            read_tokenizer(engine), EngineInfo.load(engine), load_prompts(prompts, limit), max_new_tokens=new_tokens
        )
        ids = [item[2] for item in encoded]
        chosen = {name: entry for name, entry in GROUPS[group].items() if not contender or name in (OURS, *contender)}
        place, longest = Place(engine, checkpoint, work), max(map(len, ids)) + new_tokens
        figures, absent = all_rounds(
            lambda names, chosen=chosen, place=place, longest=longest: start(  # type: ignore[misc]
                {name: chosen[name] for name in names}, place, cores, longest
            ),
            list(chosen), ids, new_tokens, min(rounds, len(ids)),
        )  # fmt: skip
        rows = summary(figures)
        title = f"{group}: {len(ids)} prompts of {min(map(len, ids))} .. {max(map(len, ids))} tokens, {cores} threads"
        Console().print(_table(rows, absent, title, len(ids)))
        body["groups"][group] = {"rows": rows, "absent": absent, "ms": {name: f.ms for name, f in figures.items()}}
    if json_file:
        json_file.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def _table(rows: Mapping[str, Mapping[str, Any]], absent: Mapping[str, str], title: str, count: int) -> Table:
    table = Table("", "step, ms", "95% CI", "fastest tenth", "time over ours", "95% CI", "equal outputs", title=title)
    for name, row in rows.items():
        (low, high), (least, most) = row["step_ms_ci95"], row["ratio_ci95"]
        ratio = ("1", "") if name == OURS else (f"{row['ratio']:.2f}", f"{least:.2f} .. {most:.2f}")
        equal = "" if name == OURS else f"{row['equal']} of {count}"
        table.add_row(
            name, f"{row['step_ms']:.1f}", f"{low:.1f} .. {high:.1f}", f"{row['fastest_tenth_ms']:.1f}", *ratio, equal
        )
    for name, reason in absent.items():
        table.add_row(name, "absent", reason)
    return table


if __name__ == "__main__":
    typer.run(main)
