"""The answers of one request, from the scheduler's thread to a coroutine that may go away at any time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Executor
from functools import partial

from medusa_export.engines.serving.request import RequestHandle
from medusa_export.engines.serving.text_service import Piece, TextRequest, TextService


class AsyncAnswer:
    """Made in a running event loop, and asked there.

    Args:
        requests: one for each choice; they are decoded side by side.
        executor: where requests are encoded: a long one takes as long as many steps.
    """

    def __init__(self, service: TextService, requests: Sequence[TextRequest], executor: Executor) -> None:
        self._service, self._requests, self._executor = service, requests, executor
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()  # at most a piece a token
        self._handles: list[RequestHandle] = []
        self._submitted: list[RequestHandle | None] = []
        self._is_cancelled = False

    async def submit(self) -> None:
        """Queue the requests, all or none.

        Raises:
            MedusaExportError: as :meth:`~medusa_export.engines.serving.text_service.TextService.submit`.
        """
        await asyncio.shield(self._loop.run_in_executor(self._executor, self._submit))

    def cancel(self) -> None:
        """Free its slots before the next step, however far it is; nothing happens where it has ended."""
        self._is_cancelled = True
        for handle in list(self._handles):
            handle.cancel()

    @property
    def prompt_tokens(self) -> list[int]:
        """Of each request that was queued; 0 where no answer is wanted, whose only piece says it."""
        return [len(handle.input_ids) if handle else 0 for handle in self._submitted]

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """What is said, and in which choice, to the end of all, which each one's last piece has."""
        open_choices = len(self._requests)
        while open_choices:
            index, piece = await self._pieces.get()
            open_choices -= piece.end is not None
            yield index, piece

    def _submit(self) -> None:
        """In the executor. Whoever cancels meanwhile sees the handles, or is seen here."""
        for index, request in enumerate(self._requests):
            if self._is_cancelled:
                break
            handle = self._service.submit(request, partial(self._say, index))
            self._submitted.append(handle)
            if handle is not None:
                self._handles.append(handle)
        if self._is_cancelled:
            self.cancel()

    def _say(self, index: int, piece: Piece) -> None:
        """In the scheduler's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever listened
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))
