"""Batched decoding against one sequence at a time, through slots that are taken over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.engines.decoding.generate import generate
from medusa_export.engines.decoding.protocols import AUTOREGRESSIVE
from medusa_export.engines.onnxruntime.batch_engine import TreeBatchDecoder
from medusa_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from medusa_export.engines.onnxruntime.slots import BatchDecoder
from medusa_export.engines.serving.local_chat import BatchChatModel
from medusa_export.heads.decoding.sampling import Sampling

PROMPTS = [[3, 4, 5], [9, 8, 7, 6, 5, 4, 3], [11], [5, 5, 12, 13], [20, 21]]
TOKENS = 9


class Letters:
    """A stand-in for a tokenizer: a message is its ids, and an answer too."""

    chat_template = "ids"
    name_or_path = "letters"
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return messages[-1]["content"]

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, tokens: list[int], **_: Any) -> str:
        return " ".join(map(str, tokens))


@pytest.fixture
def engine_dir(tiny_engine: Callable[..., Any]) -> Path:
    path: Path = tiny_engine().path
    return path


def test_answers_are_those_of_one_sequence_at_a_time(engine_dir: Path) -> None:
    engine = OnnxRuntimeEngine(engine_dir)
    single = [
        generate(engine, ids, AUTOREGRESSIVE, max_new_tokens=TOKENS, eos_token_ids=engine.info.eos_token_ids)
        for ids in PROMPTS
    ]
    model = BatchChatModel(TreeBatchDecoder(engine_dir, slots=2), Letters(), "tiny")  # type: ignore[arg-type]

    async def ask() -> list[Any]:
        messages = [[{"role": "user", "content": " ".join(map(str, ids))}] for ids in PROMPTS]
        limits = [TOKENS, 3, TOKENS, TOKENS, TOKENS]  # so that slots become free at different times
        answers = await asyncio.gather(
            *(model.answer(asked, Sampling(max_tokens=limit)) for asked, limit in zip(messages, limits, strict=True))
        )
        await model.close()
        return answers

    for index, (answer, expected) in enumerate(zip(asyncio.run(ask()), single, strict=True)):
        tokens = expected.tokens[:3] if index == 1 else expected.tokens
        assert answer.text == " ".join(map(str, tokens))
        assert answer.completion_tokens == len(tokens)


def test_refusals(engine_dir: Path) -> None:
    decoder = BatchDecoder(engine_dir, slots=1, max_length=4)
    with pytest.raises(ConfigError, match="4 tokens"):
        decoder.admit([1, 2, 3, 4])
    decoder.admit([1, 2, 3])
    with pytest.raises(ConfigError, match="in use"):
        decoder.admit([1])
    with pytest.raises(ConfigError, match="at least one"):
        BatchDecoder(engine_dir, slots=0)
