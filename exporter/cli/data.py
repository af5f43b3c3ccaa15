"""medusa-data: parse, call one function, print."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import typer

from medusa_export.core.errors import ConfigError
from medusa_export.core.flags import COUNT, NUMBER, POSITIVE, flag
from medusa_export.core.hub import REVISION_HELP, find_model, source_name
from medusa_export.core.text.tokenizer import CHAT_TEMPLATE_HELP, read_tokenizer
from medusa_export.exporter.cli.console import command_app, main, stderr, stdout
from medusa_export.exporter.cli.flags.commands import Common, command, require
from medusa_export.heads.contract.engine_info import ENGINE_FILE, find_engine
from medusa_export.heads.data.chat_model import ChatModel, ModelFactory
from medusa_export.heads.data.conversations import Conversation, read_conversations
from medusa_export.heads.data.distill import Executor, Summary, distill, require_rows
from medusa_export.heads.data.row_store import Maker
from medusa_export.heads.decoding.sampling import Sampling

data_app = command_app()


def _in_process(model: ChatModel, factory: ModelFactory, maker: Maker, concurrency: int, workers: int) -> Executor:
    from medusa_export.heads.data.local_executor import local_executor

    return local_executor(model, maker, concurrency)


def _on_ray(model: ChatModel, factory: ModelFactory, maker: Maker, concurrency: int, workers: int) -> Executor:
    import asyncio

    from medusa_export.heads.data.ray_executor import ray_executor

    asyncio.run(model.close())  # every worker opens its own
    return ray_executor(factory, maker, workers=workers, concurrency=concurrency)


@dataclass(frozen=True)
class ExecutorKind:
    """Where conversations are run.

    Attributes:
        description: for --help.
        start: (opened model, what opens another, maker, concurrency, workers) gives what runs them.
    """

    description: str
    start: Callable[[ChatModel, ModelFactory, Maker, int, int], Executor]


EXECUTORS = {
    "local": ExecutorKind("in this process", _in_process),
    "ray": ExecutorKind("on a Ray cluster", _on_ray),
}

INPUT, OUTPUT, MODEL, SERVER, SAMPLING, WORK = (
    "Input",
    "Output",
    "Model",
    "Server",
    "Sampling",
    "Work",
)  # headings of --help
_HERE = "--model without --server"
_SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class DataFlags:
    """The flags of medusa-data."""

    prompts: tuple[Path, ...] = flag(
        help="JSONL with messages, conversations, turns or prompt. Can be repeated.", panel=INPUT
    )
    output: Path = flag(help="JSONL file to write; rows that it already has are kept.", panel=OUTPUT)
    model: str | None = flag(
        None, help="Model to run here: a directory, or owner/name on the hub. With --server, the name that it serves.", panel=MODEL,
        metavar="DIR|NAME",
    )  # fmt: skip
    server: tuple[str, ...] = flag(
        (), help="URL of a server with OpenAI's protocol. Can be repeated. Key: OPENAI_API_KEY.", panel=SERVER, metavar="URL"
    )  # fmt: skip
    concurrency: int | None = flag(
        None,
        help="Conversations at once, per worker.",
        panel=WORK,
        default="16 per server, or --max-batch",
        bounds=NUMBER,
    )
    timeout: float | None = flag(
        None,
        help="Seconds to wait for a server.",
        panel=SERVER,
        default="600",
        requires="--server",
        bounds=POSITIVE,
    )
    retries: int | None = flag(
        None,
        help="Retries of a failed request to a server.",
        panel=SERVER,
        default="5",
        requires="--server",
        bounds=COUNT,
    )
    max_batch: int | None = flag(
        None,
        help="Conversations that a model on this machine answers at once.",
        panel=MODEL,
        default="16",
        requires=_HERE,
        bounds=NUMBER,
    )
    max_length: int | None = flag(
        None, help="Maximum tokens of a conversation with a model run on this machine.", panel=MODEL, default="the model's",
        requires=_HERE, bounds=NUMBER,
    )  # fmt: skip
    revision: str | None = flag(None, help=REVISION_HELP, panel=MODEL, requires=_HERE)
    chat_template: Path | None = flag(None, help=CHAT_TEMPLATE_HELP, panel=MODEL, requires=_HERE)
    skip_bad_lines: bool = flag(False, help="Report bad lines and go on.", panel=INPUT)
    limit: int | None = flag(None, help="Use only the first N conversations.", panel=INPUT, metavar="N", bounds=NUMBER)
    executor: str = flag(
        "local", help="Where to run.", panel=WORK, choices={name: row.description for name, row in EXECUTORS.items()}
    )
    workers: int | None = flag(
        None,
        help="Ray actors; each opens the model.",
        panel=WORK,
        default="2",
        requires="--executor ray",
        bounds=NUMBER,
    )
    force: bool = flag(False, help="Drop rows of the output that belong to another run.", panel=OUTPUT)


@command(data_app)
def data_command(own: DataFlags, sampling: Sampling, common: Common) -> None:
    """Have the base model answer prompts, as training data for its Medusa heads. Run it again to continue after an interruption.

    Exit code 1: some conversations failed; run it again to try those.

    Example: medusa-data --prompts chats.jsonl --server http://localhost:8000 --output data.jsonl
    """
    _check_flags(own)
    conversations, problems = read_conversations(own.prompts, skip_bad=own.skip_bad_lines, limit=own.limit)
    for problem in problems[: None if common.verbose else _SHOWN_PROBLEMS]:
        stderr.print(f"skipped: {problem}", soft_wrap=True)
    if problems:
        stderr.print(f"bad lines skipped: {len(problems)}")
    with _engine(own, conversations, sampling) as opened:
        maker, execute = _executor(_factory(opened), sampling, opened)
        with _progress_bar() as progress:
            summary = distill(conversations, execute, own.output, maker=maker, progress=progress, force=own.force)
    _print_summary(summary, own.output, conversations)


def _check_flags(given: DataFlags) -> None:
    """Raise ConfigError for values and combinations that cannot be meant."""
    if not given.server and not given.model:
        raise ConfigError(
            "--model", "nothing", "a directory, owner/name on the hub, or --server URL", "see medusa-data --help"
        )
    executors = {f"--executor {name}": given.executor == name for name in EXECUTORS}
    require(given, {"--server": bool(given.server), _HERE: not given.server, **executors})


@contextmanager
def _engine(given: DataFlags, conversations: list[Conversation], sampling: Sampling) -> Iterator[DataFlags]:
    """The flags with an engine's directory for --model: a Hugging Face one gets an engine of its own for as long as it takes."""
    if given.server or given.model is None:
        yield given
        return
    engine = find_engine(Path(given.model))
    if (engine / ENGINE_FILE).is_file():
        yield replace(given, model=str(engine))
        return
    import tempfile

    from medusa_export.core.artifacts.hashing import sha256_all
    from medusa_export.core.text.encoding import encode_chat
    from medusa_export.exporter.engine_dirs.onnxruntime import write_base_engine
    from medusa_export.heads.checkpoint.decoder_config import DecoderConfig
    from medusa_export.heads.checkpoint.tensor_source import TensorSource

    model = find_model(given.model, revision=given.revision, check=DecoderConfig.from_dir)
    DecoderConfig.from_dir(model.path)
    encode_chat(read_tokenizer(model.path, given.chat_template), [{"role": "user", "content": "question"}])
    files = [model.path / "config.json", *TensorSource.open(model.path).files]
    source = model.recorded({path.name: digest for path, digest in zip(files, sha256_all(files), strict=True)})
    require_rows(given.output, conversations, Maker(source_name(source), sampling), force=given.force)
    with tempfile.TemporaryDirectory(prefix="medusa-data-") as folder:
        write_base_engine(
            Path(folder) / "engine", model.path, source=source, max_length=given.max_length,
            chat_template=given.chat_template,
        )  # fmt: skip
        yield replace(given, model=str(Path(folder) / "engine"))


def _factory(given: DataFlags) -> ModelFactory:
    """What opens the model, here or in another process."""
    if given.server:
        from medusa_export.heads.data.openai_client import open_servers

        options = {name: getattr(given, name) for name in ("timeout", "retries") if getattr(given, name) is not None}
        return partial(open_servers, given.server, model=given.model, **options)
    from medusa_export.engines.serving.local_chat import open_chat_model

    path, max_batch = Path(str(given.model)), given.max_batch or 16
    return partial(
        open_chat_model, path, max_batch=max_batch, max_length=given.max_length, chat_template=given.chat_template
    )


def _executor(factory: ModelFactory, sampling: Sampling, given: DataFlags) -> tuple[Maker, Executor]:
    """The model is opened here in any case: its name is needed, and what is wrong with it shows before work is spread."""
    concurrency = given.concurrency or given.max_batch or 16 * max(1, len(given.server))
    model = factory()
    maker = Maker(model.name, sampling)
    return maker, EXECUTORS[given.executor].start(model, factory, maker, concurrency, given.workers or 2)


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int, int], None]]:
    """Conversations done, tokens per second and the time left, on stderr; nothing where that is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
        )
    if summary.failures:
        name, reason = summary.failures[0]
        stderr.print(
            f"error: {len(summary.failures)} of {len(conversations)} conversations failed; the first, {name}: {reason}",
            style="red",
            soft_wrap=True,
        )
        raise typer.Exit(1)


def data_main() -> None:
    """Entry point of medusa-data."""
    main(data_app)
