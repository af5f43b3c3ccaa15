"""Conversations answered by a Ray cluster: actors that each open the model, fed by Ray Data."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from medusa_export.core.errors import ConfigError, MedusaExportError, missing_package
from medusa_export.heads.data.chat_model import ModelFactory, ModelUnavailableError
from medusa_export.heads.data.conversations import Conversation
from medusa_export.heads.data.distill import Executor, Outcome
from medusa_export.heads.data.local_executor import answer_all
from medusa_export.heads.data.row_store import Maker

logger = logging.getLogger(__name__)

_COLUMNS = ("key", "row", "failure", "unavailable")  # of what an actor returns


def ray_executor(factory: ModelFactory, maker: Maker, *, workers: int, concurrency: int) -> Executor:
    """Have ``workers`` actors answer, each at most ``concurrency`` conversations at once.

    A cluster that Ray knows of (RAY_ADDRESS, or one started on this machine) is joined; without one, this machine becomes one for
    the time. An actor's outcomes come back when all conversations of its batch, as many as ``concurrency``, are done.

    Args:
        factory: opens the model in an actor, where this package has to be installed too.

    Raises:
        ConfigError: no workers, or no concurrency.
        MissingPackageError: no ray.
    """
    try:
        import ray.data
    except ImportError as error:
        raise missing_package("ray", "ray") from error
    for name, value in (("--workers", workers), ("--concurrency", concurrency)):
        if value < 1:
            raise ConfigError(name, f"{value}", "at least one", "change it")

    def execute(conversations: Sequence[Conversation], report: Callable[[Outcome], None]) -> None:
        if not conversations:
            return
        by_key = {conversation.key: conversation for conversation in conversations}
        items = [{"conversation": json.dumps(asdict(conversation))} for conversation in conversations]
        with _cluster():
            blocks = -(-len(items) // concurrency)  # a block's outcomes come back together, so it is one batch
            results = ray.data.from_items(items, override_num_blocks=blocks).map_batches(
                _Actor,
                fn_constructor_args=(factory, maker, concurrency),
                batch_size=concurrency,
                compute=ray.data.ActorPoolStrategy(size=min(workers, blocks)),
            )
            for batch in results.iter_batches(batch_size=None, prefetch_batches=0):  # iter_rows would hold one back
                _report(batch, by_key, report)

    return execute


def _report(batch: Mapping[str, Any], by_key: Mapping[str, Conversation], report: Callable[[Outcome], None]) -> None:
    """Pass on what an actor returned; its texts have become arrays."""
    for key, row, failure, unavailable in zip(*(map(str, batch[name]) for name in _COLUMNS), strict=True):
        if unavailable:
            raise ModelUnavailableError(*json.loads(unavailable))
        report(Outcome(by_key[key], json.loads(row), failure))


class _Actor:
    """Opens the model once and answers batches; what goes in and out is text, which crosses any two versions of Python."""

    def __init__(self, factory: ModelFactory, maker: Maker, concurrency: int) -> None:
        self._factory, self._maker, self._concurrency = factory, maker, concurrency
        self._loop = asyncio.new_event_loop()  # the connections of a model belong to one
        self._model: Any = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """``conversation`` [B] in JSON -> ``key``, ``row`` and ``failure`` [B], ``unavailable`` [B]: why there is no model, or ""."""
        outcomes: list[Outcome] = []
        unavailable = ""
        try:
            self._model = self._model or self._factory()  # not in __init__: Ray would start the actor again and again
            conversations = [_conversation(text) for text in batch["conversation"]]
            work = answer_all(self._model, conversations, self._maker, self._concurrency, outcomes.append)
            self._loop.run_until_complete(work)
        except MedusaExportError as error:
            unavailable = json.dumps([error.where, error.got, error.expected, error.action])
        rows = [(outcome.conversation.key, json.dumps(outcome.row), outcome.failure, "") for outcome in outcomes]
        rows += [("", "null", "", unavailable)] if unavailable else []  # after the rows, so that those are kept
        return dict(zip(_COLUMNS, map(list, zip(*rows, strict=True)), strict=True))


def _conversation(text: str) -> Conversation:
    fields = json.loads(text)
    return Conversation(**{**fields, "turns": tuple(fields["turns"])})


@contextmanager
def _cluster() -> Iterator[None]:
    """A Ray cluster, quiet unless this package logs what happens; one that is joined or started here is left at the end."""
    import ray
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    verbose = logger.isEnabledFor(logging.INFO)
    logging.getLogger("ray.data").setLevel(logging.INFO if verbose else logging.ERROR)
    if ray.is_initialized():
        yield
        return
    with _own_signals():
        ray.init(
            include_dashboard=False, log_to_driver=verbose, logging_level=logging.INFO if verbose else logging.ERROR
        )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _own_signals() -> Iterator[None]:
    """SIGTERM as it was before: Ray's handler dumps a stack and aborts."""
    is_main = threading.current_thread() is threading.main_thread()  # the only one that can set handlers
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if is_main and handler is not None:
        signal.signal(signal.SIGTERM, handler)
