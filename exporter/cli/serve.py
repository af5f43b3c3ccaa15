"""medusa-serve: parse, call one function, print. Like the other cli files, it may import across."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from medusa_export.core.errors import ConfigError
from medusa_export.exporter.cli import serving_flags as flags
from medusa_export.exporter.cli.console import Verbose, command_app, main, stderr, stdout

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
    kv_cache_mb: flags.KvCacheMb = None,
    max_queue: Annotated[
        int | None, typer.Option(help="Requests that wait, at most; others get 429. Default: 256.")
    ] = None,
    max_tokens: flags.MaxTokens = None,
    timeout_s: flags.TimeoutS = None,
    max_text_bytes: flags.MaxTextBytes = None,
    tree: flags.TreeFile = None,
    tree_max_batch: flags.TreeMaxBatch = None,
    prefill_tokens: flags.PrefillTokens = None,
    threads: flags.Threads = None,
    grace_s: flags.GraceS = None,
    verbose: Verbose = False,
) -> None:
    """Serve an engine with OpenAI's protocol, until SIGTERM or Ctrl-C.

    Example: [bold]medusa-serve --engine out/engine --port 8000[/]
    """
    given = dict(locals())
    from medusa_export.engines.serving.decoders import require_served
    from medusa_export.engines.serving.openai.front import FrontOptions, OpenAIFront
    from medusa_export.engines.serving.openai.prometheus import PrometheusMeter
    from medusa_export.engines.serving.openai.server import bind, run_front
    from medusa_export.engines.serving.options import ServingOptions
    from medusa_export.engines.serving.text_service import TextService
    from medusa_export.heads.contract.engine_info import EngineInfo

    options, info = flags.given_options(ServingOptions, given), EngineInfo.load(engine)
    require_served(engine, info, options)
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
                OpenAIFront(service, front_options), meter, sock, grace_s=options.grace_s, log_requests=verbose,
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
