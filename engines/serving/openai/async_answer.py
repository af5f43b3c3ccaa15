"""One answer of a text service, from the scheduler's thread to a coroutine that may go away at any time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import Executor

from medusa_export.engines.serving.request import FinishInfo, RequestHandle
from medusa_export.engines.serving.text_service import Piece, TextRequest, TextService


class AsyncAnswer:
    """Made in a running event loop, and asked there.

    Args:
        executor: where requests are encoded: a long one takes as long as many steps.
    """

    def __init__(self, service: TextService, request: TextRequest, executor: Executor) -> None:
        self._service, self._request, self._executor = service, request, executor
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()  # at most a piece a token
        self._handle: RequestHandle | None = None
        self._is_cancelled = False

    async def submit(self) -> None:
        """Queue the request.

        Raises:
            MedusaExportError: as :meth:`~medusa_export.engines.serving.text_service.TextService.submit`.
        """
        await asyncio.shield(self._loop.run_in_executor(self._executor, self._submit))

    def cancel(self) -> None:
        """Free its slot before the next step, however far it is; nothing happens where it has ended."""
        self._is_cancelled = True
        if self._handle is not None:
            self._handle.cancel()

    async def pieces(self) -> AsyncIterator[Piece]:
        """What is said, to the end, which the last piece has."""
        end = None
        while end is None:
            piece = await self._pieces.get()
            end = piece.end
            yield piece

    async def whole(self) -> tuple[str, FinishInfo]:
        """All text, and how it ended."""
        texts, end = [], None
        async for piece in self.pieces():
            texts.append(piece.text)
            end = piece.end
        assert end is not None, "the last piece has it"
        return "".join(texts), end

    def _submit(self) -> None:
        """In the executor. Whoever cancels meanwhile sees the handle, or is seen here."""
        if not self._is_cancelled:
            self._handle = self._service.submit(self._request, self._say)
        if self._is_cancelled and self._handle is not None:
            self._handle.cancel()

    def _say(self, piece: Piece) -> None:
        """In the scheduler's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever listened
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
