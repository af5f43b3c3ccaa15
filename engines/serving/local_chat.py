"""Chat answers from an engine in this process: callers wait for their own answer while the scheduler decodes all."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import TYPE_CHECKING

from medusa_export.core.hub import source_name
from medusa_export.core.text.encoding import encode_chat
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.core.typed_paths import as_recorded
from medusa_export.engines.onnxruntime.batch_engine import TreeBatchDecoder
from medusa_export.engines.serving.request import FinishInfo
from medusa_export.engines.serving.scheduler import Scheduler
from medusa_export.heads.data.chat_model import ChatAnswer
from medusa_export.heads.decoding.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_chat_model(
    model: Path, *, max_batch: int, max_length: int | None, chat_template: Path | None = None
) -> BatchChatModel:
    """The engine of a directory as a :class:`medusa_export.heads.data.chat_model.ChatModel`.

    Args:
        model: an engine directory, with its tokenizer.
        max_batch: conversations answered at once.
        max_length: tokens of a conversation; None: the engine's context.
        chat_template: a file with the template to use instead of the tokenizer's own.
    """
    decoder = TreeBatchDecoder(model, slots=max_batch, max_length=max_length)
    return BatchChatModel(
        decoder, read_tokenizer(model, chat_template), source_name(decoder.info.source) or as_recorded(model)
    )


class BatchChatModel:
    """Answers from a :class:`TreeBatchDecoder`, as many at once as it has slots; the others wait in their order.

    Args:
        name: what the answers are recorded as coming from.
    """

    def __init__(self, decoder: TreeBatchDecoder, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.name = name
        self._tokenizer = tokenizer
        self._scheduler = Scheduler(decoder)

    async def answer(self, messages: Sequence[Mapping[str, str]], sampling: Sampling) -> ChatAnswer:
        """The model's answer to a conversation.

        Raises:
            ConfigError: the prompt fills the context, or the chat template refuses the messages.
        """
        callbacks = _Collector()
        handle = self._scheduler.submit(encode_chat(self._tokenizer, messages), sampling, callbacks)
        try:
            end = await asyncio.wrap_future(callbacks.future)
        except asyncio.CancelledError:
            handle.cancel()
            raise
        text = self._tokenizer.decode(handle.tokens, skip_special_tokens=True)
        return ChatAnswer(str(text), end.reason, len(handle.tokens))

    async def close(self) -> None:
        """Stop the thread; answers that were not finished are cancelled."""
        await asyncio.to_thread(self._scheduler.close)


class _Collector:
    """Tells a waiting caller of the end."""

    def __init__(self) -> None:
        self.future: Future[FinishInfo] = Future()
        self.future.set_running_or_notify_cancel()  # a caller that gives up does not end it: the scheduler does

    def take(self, token: int) -> bool:
        return True

    def flush(self) -> None:
        """Nothing to do: the tokens are the request handle's."""

    def end(self, end: FinishInfo) -> None:
        if end.error is not None:
            self.future.set_exception(end.error)
        elif end.reason in ("stop", "length"):
            self.future.set_result(end)
        else:
            self.future.set_exception(CancelledError())
