"""medusa-triton: parse, call one function, print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import typer

from medusa_export.core.errors import ConfigError
from medusa_export.core.flags import COUNT, flag, requirement_error
from medusa_export.engines.serving.options import INPUT, ServingOptions, TreeChoice
from medusa_export.engines.serving.triton_trtllm.configs import TrtllmServing
from medusa_export.exporter.cli.console import command_app, main, stderr, stdout
from medusa_export.exporter.cli.flags.commands import Given, callback, command
from medusa_export.heads.contract.engine_info import ENGINE_FILE, ENGINE_HELP, find_engine

triton_app = command_app()
SERVER = "Server"  # heading of --help


@dataclass(frozen=True)
class TritonFlags:
    """What medusa-triton takes for every engine."""

    engine: Path = flag(help=ENGINE_HELP, panel=INPUT)
    output: Path = flag(help="Model repository to write.", panel="Output")
    name: str = flag("medusa", help="The model's name on the server.", panel="Output")


@dataclass(frozen=True)
class RepositoryVerifyFlags:
    """What medusa-triton verify takes."""

    repository: Path = flag(help="A model repository, of medusa-triton or another tool.", panel=INPUT, positional=True)


@dataclass(frozen=True)
class RepositoryServeFlags:
    """What medusa-triton serve takes."""

    repository: Path = flag(help="A model repository that medusa-triton wrote.", panel=INPUT, positional=True)
    host: str = flag("127.0.0.1", help="Address to listen on.", panel=SERVER)
    http_port: int = flag(8000, help="Port of the HTTP endpoint.", panel=SERVER)
    grpc_port: int = flag(8001, help="Port of the gRPC endpoint.", panel=SERVER)
    metrics_port: int = flag(8002, help="Port of the metrics.", panel=SERVER)
    exit_timeout_s: int = flag(
        30,
        help="Seconds for requests in flight to finish when the server stops.",
        panel=SERVER,
        metavar="SECONDS",
        bounds=COUNT,
    )
    install: bool = flag(
        False, panel=SERVER,
        help="Serve with the wheel nvidia-pytriton, which pip installs once into the user's cache, instead of the tritonserver "
        "of the PATH or of this environment.",
    )  # fmt: skip


@dataclass(frozen=True)
class RepositoryKind:
    """One kind of model repository.

    Attributes:
        engines: those that it serves, in words.
        holds: whether a directory has such an engine.
        write: the repository, from the flags.
        verify: what is wrong with a repository whose manifest names this kind, one line each.
        flags: what it takes besides --engine, --output and --name; another kind's are refused.
    """

    engines: str
    holds: Callable[[Path], bool]
    write: Callable[[TritonFlags, Given], None]
    verify: Callable[[Path], list[str]]
    flags: tuple[type, ...]


def _write_python(own: TritonFlags, given: Given) -> None:
    from medusa_export.engines.serving.triton.repository import write_repository

    options, choice = given.build(ServingOptions), given.build(TreeChoice)
    write_repository(own.engine, own.output, name=own.name, options=options, tree=choice.tree)


def _verify_python(repository: Path) -> list[str]:
    from medusa_export.engines.serving.triton.repository import verify_repository

    return verify_repository(repository)


def _is_trtllm(path: Path) -> bool:
    from medusa_export.engines.serving.triton_trtllm.repository import is_trtllm_engine

    return is_trtllm_engine(path)


def _write_trtllm(own: TritonFlags, given: Given) -> None:
    from medusa_export.engines.serving.triton_trtllm.repository import write_trtllm_repository

    write_trtllm_repository(own.engine, own.output, given.build(TrtllmServing))


def _verify_trtllm(repository: Path) -> list[str]:
    from medusa_export.engines.serving.triton_trtllm.repository import verify_trtllm_repository

    return verify_trtllm_repository(repository)


# By the name in a repository's manifest; the first kind that has such an engine as --engine is its kind.
KINDS: dict[str, RepositoryKind] = {
    "tensorrt-llm": RepositoryKind("a TensorRT-LLM engine", _is_trtllm, _write_trtllm, _verify_trtllm, (TrtllmServing,)),
    "python": RepositoryKind(
        "an ONNX Runtime or TensorRT engine", lambda path: (path / ENGINE_FILE).is_file(), _write_python, _verify_python,
        (ServingOptions, TreeChoice),
    ),
}  # fmt: skip


@callback(triton_app, either=(ServingOptions, TreeChoice, TrtllmServing))
def triton_command(own: TritonFlags, given: Given) -> None:
    """Write a Triton model repository for an engine.

    Example: medusa-triton --engine out/engine --output repository
    """
    own = replace(own, engine=find_engine(own.engine))
    kind = next((kind for kind in KINDS.values() if kind.holds(own.engine)), None)
    if kind is None:
        expected = " or ".join(kind.engines for kind in KINDS.values())
        raise ConfigError(str(own.engine), "no engine directory", expected, "pass an export, or its engine directory")
    for key in given.without(*kind.flags):
        option = f"--{key.replace('_', '-')}"
        others = [each.engines for each in KINDS.values() if key not in given.without(*each.flags)]
        raise requirement_error(option, given[key], " or ".join(others))
    kind.write(own, given)
    stdout.print(f"wrote {own.output}", soft_wrap=True)


@command(triton_app, "verify")
def verify_command(own: RepositoryVerifyFlags) -> None:
    """Check a repository again: every file, every configuration, the engine and the tokenizer.

    Of a repository that another tool wrote: configurations, the engine's parameters, and the steps of ensembles. Exit code 1 when
    something is wrong.

    Example: medusa-triton verify repository
    """
    from medusa_export.core.artifacts.manifest import has_manifest, read_manifest
    from medusa_export.engines.serving.triton_trtllm.foreign import verify_foreign_repository

    if not has_manifest(own.repository):
        problems = verify_foreign_repository(own.repository)
    else:
        kind = read_manifest(own.repository)["arguments"].get("kind")
        if kind not in KINDS:
            expected = "one that medusa-triton or another tool wrote"
            raise ConfigError(str(own.repository), "no model repository", expected, "check the path")
        problems = KINDS[kind].verify(own.repository)
    for problem in problems:
        stdout.print(problem, soft_wrap=True)
    if problems:
        raise typer.Exit(1)
    stdout.print(f"{own.repository}: complete and consistent", soft_wrap=True)


@command(triton_app, "serve")
def serve_command(own: RepositoryServeFlags) -> None:
    """Serve a repository with tritonserver, until SIGTERM or Ctrl-C: its launch.sh, with what the server needs around it.

    Example: medusa-triton serve repository
    """
    from medusa_export.engines.serving.triton.hosting.serve import serve_repository
    from medusa_export.engines.serving.triton.hosting.server import Address

    if not own.host.startswith("127."):
        warning = f"warning: {own.host} takes requests from other machines, and Triton from anybody who reaches it"
        stderr.print(warning, soft_wrap=True)
    address = Address(own.host, own.http_port, own.grpc_port, own.metrics_port)
    serve_repository(own.repository, address, exit_seconds=own.exit_timeout_s, install=own.install, say=_say)


def _say(text: str) -> None:
    stdout.print(text, soft_wrap=True)


def triton_main() -> None:
    """Entry point of medusa-triton."""
    main(triton_app)
