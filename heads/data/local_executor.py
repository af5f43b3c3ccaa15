"""Conversations answered from this process, several at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence

from medusa_export.heads.data.chat_model import ChatModel
from medusa_export.heads.data.conversations import Conversation
from medusa_export.heads.data.distill import Executor, Outcome, converse
from medusa_export.heads.data.row_store import Maker


def local_executor(model: ChatModel, maker: Maker, concurrency: int) -> Executor:
    """Have ``model`` answer, at most ``concurrency`` conversations at once. The model is closed at the end.

    Args:
        model: what answers; closed at the end.
        maker: what else decides an answer.
        concurrency: conversations at once, at most.
    """

    def execute(conversations: Sequence[Conversation], report: Callable[[Outcome], None]) -> None:
        async def run() -> None:
            try:
                await answer_all(model, shortest_first(conversations), maker, concurrency, report)
            finally:
                await model.close()

        asyncio.run(run())

    return execute


def shortest_first(conversations: Sequence[Conversation]) -> list[Conversation]:
    """Those that are answered together are of a length, so that none reads the cache of a longer one.

    The longest come last, for they are the ones that may fail for want of room: failures before any answer end a run.
    """
    return sorted(conversations, key=lambda each: sum(map(len, (each.system, *each.turns))))


async def answer_all(
    model: ChatModel,
    conversations: Iterable[Conversation],
    maker: Maker,
    concurrency: int,
    report: Callable[[Outcome], None],
) -> None:
    """Report the outcome of every conversation as it comes.

    Args:
        model: what answers.
        conversations: in any number; taken as they are needed.
        maker: what else decides an answer.
        concurrency: conversations at once, at most.
        report: called with every outcome.

    Raises:
        Exception: the first that an answer or a report raises; the answers in flight are cancelled.
    """
    waiting = iter(conversations)

    async def work() -> None:
        for conversation in waiting:
            report(await converse(model, conversation, maker))

    workers = [asyncio.create_task(work()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
