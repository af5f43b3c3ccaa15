"""medusa-triton: parse, call one function, print. Like the other cli files, it may import across."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.cli import serving_flags as flags
from medusa_export.exporter.cli.console import Verbose, command_app, main, stdout
from medusa_export.heads.contract.engine_info import ENGINE_FILE

triton_app = command_app()


@dataclass(frozen=True)
class Kind:
    """One kind of model repository.

    Attributes:
        engines: backends of the engines that it serves.
        holds: whether a directory has such an engine.
        write: the repository, from the flags.
        verify: what is wrong with a repository whose manifest names this kind, one line each.
        flags: what it takes besides --engine, --output and --name; another kind's are refused.
    """

    engines: str
    holds: Callable[[Path], bool]
    write: Callable[[dict[str, Any]], None]
    verify: Callable[[Path], list[str]]
    flags: tuple[str, ...]


def _write_python(given: dict[str, Any]) -> None:
    from medusa_export.engines.serving.options import ServingOptions
    from medusa_export.engines.serving.triton.repository import write_repository

    options = flags.given_options(ServingOptions, given)
    write_repository(given["engine"], given["output"], name=given["name"], options=options, tree=given["tree"])


def _verify_python(repository: Path) -> list[str]:
    from medusa_export.engines.serving.triton.repository import verify_repository

    return verify_repository(repository)


def _is_trtllm(path: Path) -> bool:
    from medusa_export.engines.serving.triton_trtllm.repository import is_trtllm_engine

    return is_trtllm_engine(path)


def _write_trtllm(given: dict[str, Any]) -> None:
    from medusa_export.engines.serving.triton_trtllm.configs import TrtllmServing
    from medusa_export.engines.serving.triton_trtllm.repository import write_trtllm_repository

    write_trtllm_repository(given["engine"], given["output"], flags.given_options(TrtllmServing, given))


def _verify_trtllm(repository: Path) -> list[str]:
    from medusa_export.engines.serving.triton_trtllm.repository import verify_trtllm_repository

    return verify_trtllm_repository(repository)


# By the name in a repository's manifest; the first kind that has such an engine as --engine is its kind.
KINDS: dict[str, Kind] = {
    "tensorrt-llm": Kind(
        "tensorrt-llm", _is_trtllm, _write_trtllm, _verify_trtllm,
        ("max_queue", "max_text_bytes", "kv_fraction", "decoupled", "chunked_context"),
    ),
    "python": Kind(
        "onnxruntime or tensorrt", lambda path: (path / ENGINE_FILE).is_file(), _write_python, _verify_python,
        ("max_batch", "kv_cache_mb", "max_queue", "max_tokens", "timeout_s", "max_text_bytes", "tree_max_batch", "tree",
         "grace_s", "prefill_tokens", "threads"),
    ),
}  # fmt: skip


@triton_app.callback(invoke_without_command=True)
def triton_command(
    context: typer.Context,
    engine: Annotated[Path | None, typer.Option(help="The engine directory of an export.")] = None,
    output: Annotated[Path | None, typer.Option(help="The model repository to write.")] = None,
    name: Annotated[str, typer.Option(help="The model's name on the server.")] = "medusa",
    max_batch: Annotated[int | None, typer.Option(help="Requests decoded at once, at most. Default: 32.")] = None,
    kv_cache_mb: flags.KvCacheMb = None,
    max_queue: Annotated[
        int | None, typer.Option(help="Requests that wait, at most; others hear that it is busy. Default: 256.")
    ] = None,
    max_tokens: flags.MaxTokens = None,
    timeout_s: flags.TimeoutS = None,
    max_text_bytes: flags.MaxTextBytes = None,
    tree: flags.TreeFile = None,
    tree_max_batch: flags.TreeMaxBatch = None,
    grace_s: flags.GraceS = None,
    prefill_tokens: flags.PrefillTokens = None,
    threads: flags.Threads = None,
    kv_fraction: Annotated[
        float | None, typer.Option(help="TensorRT-LLM: part of the free GPU memory for the cache. Default: 0.9.")
    ] = None,
    decoupled: Annotated[
        bool | None,
        typer.Option(help="TensorRT-LLM: streams answers; without, plain calls get one response. Default: on."),
    ] = None,
    chunked_context: Annotated[
        bool | None, typer.Option(help="TensorRT-LLM: long prompts in parts, between others' steps. Default: off.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Write a Triton model repository for an engine.

    Example: [bold]medusa-triton --engine out/engine --output repository[/]
    """
    given = dict(locals())
    if context.invoked_subcommand:
        return
    for flag in ("engine", "output"):
        if given[flag] is None:
            raise ConfigError(f"--{flag}", "nothing", "a directory", "see medusa-triton --help")
    kind = next((kind for kind in KINDS.values() if kind.holds(given["engine"])), None)
    if kind is None:
        expected = f"an engine of {', '.join(kind.engines for kind in KINDS.values())}"
        raise ConfigError(str(engine), "no engine directory", expected, "pass OUT/engine of an export")
    for flag in sorted({flag for other in KINDS.values() for flag in other.flags} - set(kind.flags)):
        if given[flag] is not None:
            option = f"--{flag.replace('_', '-')}"
            raise ConfigError(option, f"{given[flag]} for an engine of {kind.engines}", "no such flag", "leave it out")
    kind.write(given)
    stdout.print(f"wrote {output}", soft_wrap=True)


@triton_app.command("verify")
def verify_command(
    repository: Annotated[Path, typer.Argument(help="A model repository that medusa-triton wrote.")],
    verbose: Verbose = False,
) -> None:
    """Check a repository again: every file, every configuration, the engine and the tokenizer.

    Exit code 1 when something is wrong.
    """
    from medusa_export.core.artifacts.manifest import read_manifest

    kind = read_manifest(repository)["arguments"].get("kind")
    if kind not in KINDS:
        raise ConfigError(str(repository), "no model repository", "one that medusa-triton wrote", "check the path")
    problems = KINDS[kind].verify(repository)
    for problem in problems:
        stdout.print(problem, soft_wrap=True, markup=False)
    if problems:
        raise typer.Exit(1)
    stdout.print(f"{repository}: complete and consistent", soft_wrap=True)


def triton_main() -> None:
    """Entry point of medusa-triton."""
    main(triton_app)
