"""Chat answers from an engine in this process: a thread steps the batch, callers wait for their own answer."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from medusa_export.engines.batch import BatchDecoder
from medusa_export.heads.chat_model import Answer, Sampling
from medusa_export.heads.conversations import encode_chat, read_tokenizer
from medusa_export.heads.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SORTED = 1024  # tokens that are sorted at first: a whole vocabulary takes milliseconds


def open_chat_model(model: Path, *, max_batch: int, max_length: int | None) -> BatchChatModel:
    """The engine of a directory as a :class:`medusa_export.heads.chat_model.ChatModel`.

    Args:
        model: an engine directory, with its tokenizer.
        max_batch: conversations answered at once.
        max_length: tokens of a conversation; None: the engine's context.
    """
    decoder = BatchDecoder(model, slots=max_batch, max_length=max_length)
    name = str(decoder.info.source.get("checkpoint", model))
    return BatchChatModel(decoder, read_tokenizer(model), name)


@dataclass
class _Sequence:
    """One answer in the making."""

    input_ids: list[int]
    sampling: Sampling
    future: Future[tuple[list[int], str]] = field(default_factory=Future)
    tokens: list[int] = field(default_factory=list)
    chance: np.random.Generator = field(default_factory=np.random.default_rng)


class BatchChatModel:
    """Answers from a :class:`BatchDecoder`, as many at once as it has slots; the others wait in their order.

    Args:
        name: what the answers are recorded as coming from.
    """

    def __init__(self, decoder: BatchDecoder, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.name = name
        self._decoder, self._tokenizer = decoder, tokenizer
        self._eos = set(decoder.info.eos_token_ids)
        self._waiting: queue.Queue[_Sequence | None] = queue.Queue()
        self._active: list[_Sequence] = []
        self._thread = threading.Thread(target=self._work, name="medusa-export-batch", daemon=True)
        self._thread.start()

    async def answer(self, messages: Sequence[Mapping[str, str]], sampling: Sampling) -> Answer:
        """The model's answer to a conversation.

        Raises:
            ConfigError: the prompt fills the context, or the chat template refuses the messages.
        """
        input_ids = encode_chat(self._tokenizer, messages)
        if len(input_ids) >= self._decoder.max_length:
            got, limit = f"{len(input_ids)} tokens", f"at most {self._decoder.max_length - 1}"
            raise ConfigError("prompt", got, limit, "shorten it, or allow longer sequences")
        chance = np.random.default_rng(sampling.seed)
        sequence = _Sequence(input_ids, sampling, chance=chance)
        self._waiting.put(sequence)
        tokens, reason = await asyncio.wrap_future(sequence.future)
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return Answer(str(text), reason, len(tokens))

    async def close(self) -> None:
        """Stop the thread; answers that were not finished are cancelled."""
        self._waiting.put(None)
        await asyncio.to_thread(self._thread.join)

    def _work(self) -> None:
        try:
            while self._admit():
                self._step()
        except BaseException as error:  # whoever waits has to hear of it
            self._fail(error)
            raise
        self._fail(None)

    def _fail(self, error: BaseException | None) -> None:
        left = [*self._active]
        while not self._waiting.empty():
            left += [item for item in [self._waiting.get()] if item is not None]
        for sequence in left:
            if error is None:
                sequence.future.cancel()
            else:
                sequence.future.set_exception(error)

    def _admit(self) -> bool:
        """Fill the free slots, waiting only when there is nothing else to do. False when the model is closed."""
        while self._decoder.active < self._decoder.slots:
            try:
                sequence = self._waiting.get(block=not self._active)
            except queue.Empty:
                return True
            if sequence is None:
                return False
            logits = self._decoder.admit(sequence.input_ids)
            self._active.append(sequence)
            self._append(len(self._active) - 1, logits)
        return True

    def _step(self) -> None:
        if not self._active:
            return
        logits = self._decoder.step([sequence.tokens[-1] for sequence in self._active])
        for slot in reversed(range(len(self._active))):  # backwards, because the last one moves into a slot that ends
            self._append(slot, logits[slot])

    def _append(self, slot: int, logits: npt.NDArray[Any]) -> None:
        """The next token of a sequence, which may be its last."""
        sequence = self._active[slot]
        token = choose(logits, sequence.sampling, sequence.chance)
        sequence.tokens.append(token)
        if token in self._eos:
            reason = "stop"
        elif len(sequence.tokens) >= sequence.sampling.max_tokens or not self._decoder.room(slot):
            reason = "length"
        else:
            return
        self._decoder.release(slot)
        last = self._active.pop()
        if last is not sequence:
            self._active[slot] = last
        sequence.future.set_result((sequence.tokens, reason))


def choose(logits: npt.NDArray[Any], sampling: Sampling, chance: np.random.Generator) -> int:
    """The next token: the best one at temperature 0, otherwise drawn from the smallest set of probability ``top_p``.

    Args:
        logits: of one position.  # [vocab_size]
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    kept = _nucleus(probabilities, sampling.top_p)
    return int(chance.choice(kept, p=probabilities[kept] / probabilities[kept].sum()))


def _nucleus(probabilities: npt.NDArray[np.float64], top_p: float) -> npt.NDArray[np.int64]:
    """The most likely tokens, as few as together reach ``top_p``, the best first."""
    best = np.argpartition(-probabilities, _SORTED)[:_SORTED] if len(probabilities) > _SORTED else np.empty(0, np.int64)
    if probabilities[best].sum() <= top_p:  # too flat for a few to suffice
        best = np.arange(len(probabilities))
    order = best[np.argsort(-probabilities[best], kind="stable")]
    return order[: 1 + int(np.searchsorted(np.cumsum(probabilities[order]), top_p))]
