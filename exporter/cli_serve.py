"""medusa-serve: parse, call one function, print. Like the other cli files, it may import across."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from medusa_export.exporter.console import Verbose, command_app, main, stderr, stdout
from medusa_export.heads.errors import ConfigError

serve_app = command_app()


@serve_app.command()
def serve_command(
    engine: Annotated[Path, typer.Option(help="The engine directory of an export.")],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The model's name. Default: that of the checkpoint's directory.")
    ] = None,
    api_key_env: Annotated[
        str | None,
        typer.Option(help="The environment variable with the key that clients have to show. Default: no key."),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option("--max-concurrent", "--max-batch", help="Requests decoded at once, at most. Default: 32."),
    ] = None,
    kv_cache_mb: Annotated[
        int | None, typer.Option(help="Memory for the key/value cache; it may lower --max-concurrent. Default: 4096.")
    ] = None,
    max_queue: Annotated[
        int | None, typer.Option(help="Requests that wait, at most; others get 429. Default: 256.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an answer where a request does not say. Default: 256.")
    ] = None,
    timeout_s: Annotated[float | None, typer.Option(help="Seconds of a request, at most. Default: 600.")] = None,
    max_text_bytes: Annotated[int | None, typer.Option(help="Text of a request, at most. Default: 1 MiB.")] = None,
    tree: Annotated[
        Path | None,
        typer.Option(
            help="tree.json of medusa-tree search instead of the engine's. One from costs of several batch sizes says which tree "
            "is used with how many requests at once."
        ),
    ] = None,
    tree_max_batch: Annotated[
        int | None,
        typer.Option(help="Requests at once up to which a tree is used that says nothing of batches. Default: 4."),
    ] = None,
    prefill_tokens: Annotated[
        int | None,
        typer.Option(
            help="Prompt tokens that are read between two steps: fewer make steadier answers, more earlier ones. Default: 128."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; 0 takes one a core. Default: 0.")] = None,
    grace_s: Annotated[float, typer.Option(help="Seconds for running requests when it is told to stop.")] = 30.0,
    verbose: Verbose = False,
) -> None:
    """Serve an engine with OpenAI's protocol, until SIGTERM or Ctrl-C.

    Example: [bold]medusa-serve --engine out/engine --port 8000[/]
    """
    given = dict(locals())
    from medusa_export.engines.openai_front import FrontOptions, OpenAIFront
    from medusa_export.engines.openai_serve import bind, run_front
    from medusa_export.engines.prometheus_meter import PrometheusMeter
    from medusa_export.engines.serving_options import ServingOptions
    from medusa_export.engines.text_service import TextService
    from medusa_export.heads.engine_info import EngineInfo

    chosen = {item.name: given[item.name] for item in fields(ServingOptions) if given[item.name] is not None}
    options, info = ServingOptions(**chosen), EngineInfo.load(engine)
    if info.backend != "onnxruntime":
        expected = "one for onnxruntime"
        raise ConfigError(str(engine), f"an engine for {info.backend}", expected, "see medusa-triton for the others")
    name = name or Path(str(info.source.get("checkpoint") or engine)).name
    front_options = FrontOptions(host, name, _key(api_key_env))
    with bind(host, port) as sock:
        if front_options.api_key is None and not front_options.is_local:
            warning = f"warning: {host} takes requests from other machines, and without --api-key-env from anybody"
            stderr.print(warning, soft_wrap=True, markup=False)
        meter = PrometheusMeter(name)
        service = TextService(engine, options, meter, tree=tree)
        slots = service.scheduler.decoder.slots
        stdout.print(
            f"{name}: {info.precision}; {slots} requests at once, {options.max_queue} waiting",
            soft_wrap=True,
            markup=False,
        )
        try:
            run_front(
                OpenAIFront(service, front_options), meter, sock, grace_s=grace_s, log_requests=verbose,
                say=lambda text: stdout.print(text, soft_wrap=True, markup=False),
            )  # fmt: skip
        finally:
            service.close()


def _key(variable: str | None) -> str | None:
    """The key that an environment variable holds; where none is asked for, none."""
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key or not key.isascii() or any(not char.isprintable() or char == " " for char in key):
        got = "no such variable, or an empty one" if not key else "characters that a header cannot hold"
        raise ConfigError(f"--api-key-env {variable}", got, "a variable with the key", "export it first")
    return key


def serve_main() -> None:
    """Entry point of medusa-serve."""
    main(serve_app)
