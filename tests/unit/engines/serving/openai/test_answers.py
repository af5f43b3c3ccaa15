"""Answers in OpenAI's words, and requests in ours."""

from __future__ import annotations

import json
from typing import Any

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.engines.serving.openai.answers import CHAT_SHAPE, DONE, TEXT_SHAPE, Writer, acceptance, text_request
from medusa_export.engines.serving.request import FinishInfo

END = FinishInfo("stop", 5, 11, 4, 1.0)


def events(text: str) -> list[Any]:
    assert text.endswith("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in text.replace(DONE, "").split("\n\n") if line]


def test_acceptance_counts_what_steps_do_not_explain() -> None:
    assert acceptance(END) == {"steps": 4, "accepted_draft_tokens": 6, "tokens_per_step": 2.5}
    assert acceptance(FinishInfo("stop", 5, 1, 0, 1.0)) == {
        "steps": 0,
        "accepted_draft_tokens": 0,
        "tokens_per_step": 0,
    }
    assert acceptance(FinishInfo("stop", 5, 0, 0, 1.0))["accepted_draft_tokens"] == 0


@pytest.mark.parametrize("shape", [CHAT_SHAPE, TEXT_SHAPE])
def test_a_stream_adds_up_to_the_whole(shape: Any) -> None:
    writer = Writer(shape, "m", has_usage=True)
    text = "a line\nand data: [DONE]\u2028\r\n"
    stream = writer.first() + writer.text(text[:9]) + writer.text(text[9:]) + writer.last(END)
    assert stream.endswith(DONE)
    chunks, whole = events(stream), writer.whole(text, END)
    key = (lambda choice: choice["delta"].get("content", "")) if shape.is_chat else (lambda choice: choice["text"])
    assert "".join(key(choice) for chunk in chunks for choice in chunk["choices"]) == text
    assert {(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks} == {
        (whole["id"], whole["created"], "m")
    }
    assert (chunks[-1]["choices"], chunks[-1]["usage"], chunks[-2]["medusa"]) == ([], whole["usage"], whole["medusa"])
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert "usage" not in events(Writer(shape, "m").text("x"))[0]


def test_requests() -> None:
    asked = text_request({"prompt": "a", "temperature": 0.5, "seed": -2, "stop": ("x",)}, 7)
    assert (asked.prompt, asked.stop, asked.sampling.temperature, asked.sampling.max_tokens) == ("a", ("x",), 0.5, 7)
    assert asked.sampling.seed == 2**64 - 2
    for values in ({"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3}):
        assert text_request({"prompt": "a", **values}, 7).sampling.max_tokens == 3
    for values, where in (
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"stream_options": True}, "stream_options"),
        ({"stream_options": False, "stream": False}, "stream_options"),
        ({"top_p": 0.0}, "top_p"),
    ):
        with pytest.raises(ConfigError) as refused:
            text_request({"prompt": "a", **values}, 7)
        assert refused.value.where == where
