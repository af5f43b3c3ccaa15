"""medusa-serve: parse, call one function, print."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from medusa_export.core.errors import ConfigError, MedusaExportError
from medusa_export.core.flags import COUNT, flag
from medusa_export.core.text.tokenizer import CHAT_TEMPLATE_HELP
from medusa_export.engines.serving.options import INPUT, ServingOptions, TreeChoice
from medusa_export.exporter.cli.console import command_app, main, stderr, stdout
from medusa_export.exporter.cli.flags.commands import Common, command
from medusa_export.heads.contract.engine_info import ENGINE_HELP

serve_app = command_app()
SERVER = "Server"  # heading of --help
# As browsers spell an Origin: no path, no port that is the scheme's own.
ORIGIN = re.compile(
    r"(?!http://[^/]*:80$|https://[^/]*:443$)[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?"
)
LOG_FORMATS = {"text": False, "json": True}  # whether a line is a JSON object

logger = logging.getLogger("medusa-serve")


@dataclass(frozen=True)
class ServeFlags:
    """What medusa-serve takes besides the limits of a server."""

    engine: Path = flag(help=ENGINE_HELP, panel=INPUT)
    host: str = flag("127.0.0.1", help="Address to listen on.", panel=SERVER)
    port: int = flag(8000, help="Port to listen on; 0: a free one.", panel=SERVER)
    name: str | None = flag(None, help="The model's name.", panel=SERVER, default="that of the checkpoint's directory")
    api_key_env: str | None = flag(
        None, help="Environment variable with the key that clients have to send.", panel=SERVER, metavar="VARIABLE",
        default="no key",
    )  # fmt: skip
    chat_template: Path | None = flag(None, help=CHAT_TEMPLATE_HELP, panel=INPUT)
    strict: bool = flag(False, help="Refuse requests with unknown fields instead of ignoring the fields.", panel=SERVER)
    cors_origin: tuple[str, ...] = flag(
        (), help="Let web pages of this origin send requests; *: of any. Can be repeated.", panel=SERVER, metavar="ORIGIN",
        default="no origin",
    )  # fmt: skip
    log_format: str = flag("text", help="Format of log lines.", panel=SERVER, choices=tuple(LOG_FORMATS))
    max_connections: int = flag(1024, help="Maximum open connections; 0: no limit.", panel=SERVER, bounds=COUNT)
    max_client_connections: int = flag(
        256, help="Maximum open connections per address; 0: no limit.", panel=SERVER, bounds=COUNT
    )


@command(serve_app)
def serve_command(own: ServeFlags, options: ServingOptions, choice: TreeChoice, common: Common) -> None:
    """Serve an engine with OpenAI's protocol, until SIGTERM or Ctrl-C.

    Example: medusa-serve --engine out/engine --port 8000
    """
    from medusa_export.engines.serving.decoders import require_served
    from medusa_export.engines.serving.openai.connections import Connections
    from medusa_export.engines.serving.openai.front import FrontOptions, OpenAIFront
    from medusa_export.engines.serving.openai.prometheus import PrometheusMeter
    from medusa_export.engines.serving.openai.request_log import configure_logging
    from medusa_export.engines.serving.openai.server import bind, run_front
    from medusa_export.engines.serving.text_service import TextService
    from medusa_export.heads.contract.engine_info import EngineInfo, find_engine

    as_json = LOG_FORMATS[own.log_format]
    configure_logging(as_json=as_json)
    say, warn = (_say_as_json, logger.warning) if as_json else (_say, _warn)
    with ExitStack() as stack:
        if as_json:
            stack.enter_context(_errors_as_json())
        engine = find_engine(own.engine)
        info = EngineInfo.load(engine)
        require_served(engine, info, options)
        name = _name(own.name or Path(str(info.source.get("checkpoint") or engine)).name)
        front_options = FrontOptions(own.host, name, _key(own.api_key_env), own.strict, _origins(own.cors_origin))
        connections = Connections(own.max_connections, own.max_client_connections)
        sock = stack.enter_context(bind(own.host, own.port))
        if front_options.api_key is None and not front_options.is_local:
            warn(f"{own.host} takes requests from other machines, and without --api-key-env from anybody")
        meter = PrometheusMeter(name)
        service = TextService(engine, options, meter, tree=choice.tree, chat_template=own.chat_template)
        stack.callback(service.close)
        slots = service.scheduler.decoder.slots
        say(f"{name}: {info.precision}; {slots} requests at once, {options.max_queue} waiting")
        run_front(OpenAIFront(service, front_options, meter), sock, connections, grace_s=options.grace_s, say=say)


@contextmanager
def _errors_as_json() -> Iterator[None]:
    """What this project raises, as a line of the log instead of plain text; with its traceback under ``-v``."""
    try:
        yield
    except MedusaExportError as error:
        logger.error("%s", error, exc_info=error if logger.isEnabledFor(logging.INFO) else None)
        raise SystemExit(2) from error


def _say(text: str) -> None:
    stdout.print(text, soft_wrap=True)


def _warn(text: str) -> None:
    stderr.print(f"warning: {text}", soft_wrap=True)


def _say_as_json(text: str) -> None:
    """On stdout, in the form of the log, so that both can be read as one."""
    from medusa_export.engines.serving.openai.request_log import Formatter

    _say(Formatter(as_json=True).format(logging.makeLogRecord({"name": logger.name, "levelname": "INFO", "msg": text})))


def _key(variable: str | None) -> str | None:
    """The key that an environment variable holds; where none is asked for, none."""
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key or not key.isascii() or any(not char.isprintable() or char == " " for char in key):
        got = "no such variable, or an empty one" if not key else "characters that a header cannot hold"
        raise ConfigError(f"--api-key-env {variable}", got, "a variable with the key", "export it first")
    return key


def _name(name: str) -> str:
    """A model's name that answers and labels can hold: paths may have bytes that are no text."""
    if not name.isprintable():
        raise ConfigError("--name", name, "printable characters", "pass another --name")
    return name


def _origins(origins: tuple[str, ...]) -> tuple[str, ...]:
    """Origins as browsers send them; any other spelling would never match.

    Raises:
        ConfigError: one that no browser sends.
    """
    for origin in origins:
        if origin not in ("*", "null") and not ORIGIN.fullmatch(origin):
            raise ConfigError(
                "--cors-origin", origin, "scheme://host or scheme://host:port, in lower case, with nothing behind it, or *",
                "write it as https://chat.example",
            )  # fmt: skip
    return origins


def serve_main() -> None:
    """Entry point of medusa-serve."""
    main(serve_app)
