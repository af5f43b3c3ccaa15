"""medusa-data: parse, call one function, print. Like the other cli files, it may import across."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.cli.console import Verbose, command_app, main, stderr, stdout
from medusa_export.heads.contract.engine_info import ENGINE_FILE
from medusa_export.heads.data.chat_model import ModelFactory
from medusa_export.heads.data.conversations import Conversation, read_conversations
from medusa_export.heads.data.distill import Executor, Summary, distill
from medusa_export.heads.data.row_store import Maker
from medusa_export.heads.decoding.sampling import Sampling

data_app = command_app()

_EXECUTORS = ("local", "ray")
_SHOWN_PROBLEMS = 5


@data_app.command()
def data_command(
    prompts: Annotated[
        list[Path], typer.Option(help="JSONL with messages, conversations, turns or prompt. May be given again.")
    ],
    output: Annotated[Path, typer.Option(help="JSONL file to write; what it has already is not made again.")],
    model: Annotated[
        str | None, typer.Option(help="Directory of a model to run here; with --server, the name that it serves.")
    ] = None,
    server: Annotated[
        list[str] | None,
        typer.Option(help="URL of a server with OpenAI's protocol. May be given again. Key: OPENAI_API_KEY."),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Conversations at once, of each worker. Default: 16 a server, or --max-batch.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most; a longer one is not usable.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the best token, as greedy decoding does.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the smallest set of tokens with this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the draws.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds to wait for a server. Default: 600.")] = None,
    retries: Annotated[int | None, typer.Option(help="Of a request to a server that fails. Default: 5.")] = None,
    max_batch: Annotated[
        int | None, typer.Option(help="Conversations at once in a model run here. Default: 16.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of a conversation in a model run here. Default: the model's.")
    ] = None,
    skip_bad_lines: Annotated[bool, typer.Option("--skip-bad-lines", help="Report bad lines and go on.")] = False,
    limit: Annotated[int | None, typer.Option(help="Only the first so many conversations.")] = None,
    executor: Annotated[str, typer.Option(help="local, or ray: on a Ray cluster.")] = "local",
    workers: Annotated[int | None, typer.Option(help="Ray actors; each opens the model. Default: 2.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Drop rows of the output that are not of this run.")] = False,
    verbose: Verbose = False,
) -> None:
    """Have the base model answer prompts: training data for its Medusa heads. Run it again to continue after an interruption.

    Exit code 1: some conversations failed; run it again to try those.

    Example: [bold]medusa-data --prompts chats.jsonl --server http://localhost:8000 --output data.jsonl[/]
    """
    given = dict(locals())
    _check_flags(given)
    sampling = Sampling(temperature, top_p, max_tokens, seed)
    conversations, problems = read_conversations(prompts, skip_bad=skip_bad_lines, limit=limit)
    for problem in problems[: None if verbose else _SHOWN_PROBLEMS]:
        stderr.print(f"skipped: {problem}", soft_wrap=True, markup=False)
    if problems:
        stderr.print(f"bad lines skipped: {len(problems)}")
    with _engine(given) as given:
        maker, execute = _executor(_factory(given), sampling, given)
        with _progress_bar() as progress:
            summary = distill(conversations, execute, output, maker=maker, progress=progress, force=force)
    _print_summary(summary, output, conversations)


def _check_flags(given: dict[str, Any]) -> None:
    """Raise ConfigError for values and combinations that cannot be meant."""
    if given["executor"] not in _EXECUTORS:
        raise ConfigError("--executor", given["executor"], " or ".join(_EXECUTORS), "choose one")
    if not given["server"] and not given["model"]:
        raise ConfigError("--model", "nothing", "the directory of a model, or --server URL", "see medusa-data --help")
    needs = {
        "--server": (bool(given["server"]), ("timeout", "retries")),
        "--model without --server": (not given["server"], ("max_batch", "max_length")),
        "--executor ray": (given["executor"] == "ray", ("workers",)),
    }
    for condition, (holds, names) in needs.items():
        for name in names:
            if given[name] is not None and not holds:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(flag, f"{given[name]}", f"it only with {condition}", "leave it out")
    for name in ("concurrency", "max_batch", "max_length", "workers"):
        if given[name] is not None and given[name] < 1:
            raise ConfigError(f"--{name.replace('_', '-')}", f"{given[name]}", "at least 1", "change it")


@contextmanager
def _engine(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The flags with an engine's directory for --model: a Hugging Face one gets an engine of its own for as long as it takes."""
    model = given["model"]
    if given["server"] or (Path(model) / ENGINE_FILE).is_file():
        yield given
        return
    from medusa_export.exporter.engine_dirs.onnxruntime import write_base_engine

    with tempfile.TemporaryDirectory(prefix="medusa-data-") as folder:
        write_base_engine(Path(folder) / "engine", Path(model), max_length=given["max_length"])
        yield {**given, "model": str(Path(folder) / "engine")}


def _factory(given: dict[str, Any]) -> ModelFactory:
    """What opens the model, here or in another process."""
    if given["server"]:
        from medusa_export.heads.data.openai_client import open_servers

        options = {name: given[name] for name in ("timeout", "retries") if given[name] is not None}
        return partial(open_servers, given["server"], model=given["model"], **options)
    from medusa_export.engines.serving.local_chat import open_chat_model

    path, max_batch = Path(given["model"]), given["max_batch"] or 16
    return partial(open_chat_model, path, max_batch=max_batch, max_length=given["max_length"])


def _executor(factory: ModelFactory, sampling: Sampling, given: dict[str, Any]) -> tuple[Maker, Executor]:
    """The model is opened here in any case: its name is needed, and what is wrong with it shows before work is spread."""
    concurrency = given["concurrency"] or given["max_batch"] or 16 * max(1, len(given["server"] or ()))
    model = factory()
    maker = Maker(model.name, sampling)
    if given["executor"] == "local":
        from medusa_export.heads.data.local_executor import local_executor

        return maker, local_executor(model, maker, concurrency)
    import asyncio

    from medusa_export.heads.data.ray_executor import ray_executor

    asyncio.run(model.close())
    return maker, ray_executor(factory, maker, workers=given["workers"] or 2, concurrency=concurrency)


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int, int], None]]:
    """Conversations done, tokens per second and the time left, on stderr; nothing where that is no terminal."""
    speed = TextColumn("{task.fields[speed]}")
    columns = (TextColumn("conversations"), BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn())
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal) as bars:
        task = bars.add_task("", total=None, speed="")

        def update(done: int, total: int, tokens: int) -> None:
            seconds = bars.tasks[0].elapsed or 0.0
            speed = f"{tokens / seconds:.0f} tokens/s" if seconds and tokens else ""
            bars.update(task, completed=done, total=total, speed=speed)

        yield update


def _print_summary(summary: Summary, output: Path, conversations: list[Conversation]) -> None:
    if summary.rows:
        speed = f", {summary.tokens / summary.seconds:.0f} tokens/s" if summary.tokens else ""
        stdout.print(
            f"wrote {output}: {summary.rows} rows ({summary.reused} made before), {summary.usable} usable; "
            f"{summary.tokens} tokens in {summary.seconds:.1f} s{speed}",
            soft_wrap=True,
            markup=False,
        )
    if summary.failures:
        name, reason = summary.failures[0]
        stderr.print(
            f"error: {len(summary.failures)} of {len(conversations)} conversations failed; the first, {name}: {reason}",
            style="red",
            soft_wrap=True,
            markup=False,
        )
        raise typer.Exit(1)


def data_main() -> None:
    """Entry point of medusa-data."""
    main(data_app)
