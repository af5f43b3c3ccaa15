"""Answers in OpenAI's words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from medusa_export.engines.serving.openai.protocol.answers import (
    CHAT_SHAPE,
    DONE,
    TEXT_SHAPE,
    Shape,
    Writer,
    acceptance,
)
from medusa_export.engines.serving.openai.protocol.asked import Asked
from medusa_export.engines.serving.openai.protocol.errors import UnfinishedError
from medusa_export.engines.serving.openai.protocol.fields import StreamOptions
from medusa_export.engines.serving.request import FinishInfo
from medusa_export.engines.serving.text_service import Piece, TextRequest
from medusa_export.heads.decoding.sampling import Sampling
from medusa_export.heads.decoding.token_choice import TokenLogprob
from tests.paths import assert_golden

END = FinishInfo("stop", 5, 11, 4, 1.0)


class Spelling:
    """Token 100 to 355 are bytes, others are called by their numbers."""

    def token_text(self, token: int) -> str:
        return f"bytes:{token - 100:02x}" if token >= 100 else f"<{token}>"

    def token_bytes(self, token: int) -> bytes:
        return bytes([token - 100]) if token >= 100 else f"<{token}>".encode()


def writer(shape: Shape, choices: int = 1, prompts: Any = (), **asked: Any) -> Writer:
    sampling = Sampling(logprobs=asked.pop("top", 2))
    requests = tuple(TextRequest(prompt="x", sampling=sampling) for _ in range(choices))
    known = asked.pop("prompt_tokens", ())
    return Writer(shape, "m", Asked(requests, **{"per_prompt": choices, **asked}), Spelling(), prompts, known)


def events(text: str) -> list[Any]:
    assert text.endswith("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in text.replace(DONE, "").split("\n\n") if line]


def test_acceptance_counts_what_steps_do_not_explain() -> None:
    assert acceptance([END]) == {"steps": 4, "accepted_draft_tokens": 6, "tokens_per_step": 2.5}
    assert acceptance([FinishInfo("stop", 5, 1, 0, 1.0)]) == {
        "steps": 0,
        "accepted_draft_tokens": 0,
        "tokens_per_step": 0,
    }
    assert acceptance([FinishInfo("stop", 5, 0, 0, 1.0)])["accepted_draft_tokens"] == 0
    assert acceptance([END, FinishInfo("stop", 5, 3, 2, 1.0)])["tokens_per_step"] == 2.0


@pytest.mark.parametrize("shape", [CHAT_SHAPE, TEXT_SHAPE])
def test_a_stream_adds_up_to_the_whole(shape: Any) -> None:
    text = "a line\nand data: [DONE]\u2028\r\n"
    pieces = [Piece(text[:9], [1]), Piece(text[9:], [2]), Piece("", [], END)]
    told, kept = writer(shape, stream_options=StreamOptions(usage=True)), writer(shape)
    stream = told.first() + "".join(told.piece(0, piece) for piece in pieces)
    for piece in pieces:
        kept.take(0, piece)
    assert stream.endswith(DONE)
    chunks, whole = events(stream), kept.whole()
    key = (lambda choice: choice["delta"].get("content", "")) if shape.is_chat else (lambda choice: choice["text"])
    assert "".join(key(choice) for chunk in chunks for choice in chunk["choices"]) == text
    said = whole["choices"][0]["message"]["content"] if shape.is_chat else whole["choices"][0]["text"]
    assert said == text
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert (chunks[-1]["choices"], chunks[-1]["usage"], chunks[-2]["medusa"]) == ([], whole["usage"], whole["medusa"])
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert "usage" not in events(writer(shape).piece(0, Piece("x", [1])))[0]
    running = events(writer(shape, stream_options=StreamOptions(running_usage=True)).piece(0, Piece("x", [1, 2])))
    assert running[0]["usage"]["completion_tokens"] == 2


def test_choices_share_their_prompt() -> None:
    made = writer(TEXT_SHAPE, 4, ["p ", "p ", "q ", "q "], per_prompt=2, echoes=True)
    for index, prompt_tokens in enumerate((5, 5, 7, 7)):
        made.take(index, Piece(f"t{index}", [1], FinishInfo("length", prompt_tokens, 3, 1, 0.0)))
    body = made.whole()
    assert body["usage"] == {"prompt_tokens": 12, "completion_tokens": 12, "total_tokens": 24}
    assert [choice["text"] for choice in body["choices"]] == ["p t0", "p t1", "q t2", "q t3"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]


def test_log_probabilities() -> None:
    logprobs = (TokenLogprob(3, -0.5, ((3, -0.5), (4, -1.5))), TokenLogprob(4, -2.0, ()))
    piece = Piece("<3><4>", [3, 4], END, logprobs, (0, 3))
    chat, plain = writer(CHAT_SHAPE), writer(TEXT_SHAPE)
    chat.take(0, piece)
    first, second = chat.whole()["choices"][0]["logprobs"]["content"]
    assert first == {
        "token": "<3>", "logprob": -0.5, "bytes": list(b"<3>"),
        "top_logprobs": [
            {"token": "<3>", "logprob": -0.5, "bytes": list(b"<3>")}, {"token": "<4>", "logprob": -1.5, "bytes": list(b"<4>")},
        ],
    }  # fmt: skip
    assert second["top_logprobs"] == []
    plain.take(0, piece)
    assert plain.whole()["choices"][0]["logprobs"] == {
        "tokens": ["<3>", "<4>"], "token_logprobs": [-0.5, -2.0], "text_offset": [0, 3],
        "top_logprobs": [{"<3>": -0.5, "<4>": -1.5}, {}],
    }  # fmt: skip


@pytest.mark.parametrize("shape", [CHAT_SHAPE, TEXT_SHAPE])
def test_log_probabilities_of_parts_of_a_character(shape: Shape) -> None:
    """Bytes rebuild the text, parts have names of their own and stand where their character does; a stop word ends all."""
    tokens = [100 + byte for byte in "hé!".encode()] + [5, 6]
    scored = [TokenLogprob(token, -0.5, ((token, -0.5), (token + 1, -1.0))) for token in tokens]
    offsets = [0, 1, 1, 2, 3, 6]
    parts = [
        Piece(text, tokens[a:b], end, tuple(scored[a:b]), tuple(offsets[a:b]), end is not None)
        for text, a, b, end in (("h", 0, 2, None), ("é", 2, 4, None), ("!", 4, 6, END))
    ]
    kept, told = writer(shape), writer(shape)
    for part in parts:
        kept.take(0, part)
    found = kept.whole()["choices"][0]["logprobs"]
    sent = [[c["choices"][0]["logprobs"] for c in events(told.piece(0, part))] for part in parts]
    if shape.is_chat:
        assert bytes(byte for one in found["content"] for byte in one["bytes"]).decode() == "hé!"
        assert [len(one[0]["content"]) for one in sent] == [1, 2, 1]
    else:
        assert found["tokens"] == ["bytes:68", "bytes:c3", "bytes:a9", "bytes:21"]
        assert found["text_offset"] == [0, 1, 1, 2]
        assert [len(top) for top in found["top_logprobs"]] == [2] * 4
        assert [one[0]["text_offset"] for one in sent] == [[0], [1, 1], [2]]


def test_no_alternatives_and_a_prompt_that_is_known_from_the_start() -> None:
    made = writer(TEXT_SHAPE, top=0)
    made.take(0, Piece("<3>", [3], END, (TokenLogprob(3, -0.5, ()),), (0,)))
    assert made.whole()["choices"][0]["logprobs"]["top_logprobs"] is None
    told = writer(CHAT_SHAPE, 2, per_prompt=2, prompt_tokens=[9, 9], stream_options=StreamOptions(running_usage=True))
    for chunk in [*events(told.first()), *events(told.piece(0, Piece("x", [1])))]:
        assert chunk["usage"]["prompt_tokens"] == 9


def test_calls_of_tools() -> None:
    said = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    made, streamed = writer(CHAT_SHAPE, calls_tools=True), writer(CHAT_SHAPE, calls_tools=True)
    made.take(0, Piece(said, [1], END))
    (choice,) = made.whole()["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    assert [call["function"] for call in choice["message"]["tool_calls"]] == [{"name": "f", "arguments": "{}"}]
    chunks = events(
        "".join(streamed.piece(0, Piece(char, [1])) for char in said) + streamed.piece(0, Piece("", [], END))
    )
    assert [chunk["choices"][0]["delta"].get("tool_calls", [{}])[0].get("index") for chunk in chunks] == [0, None]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_an_end_without_an_answer() -> None:
    for take in (writer(CHAT_SHAPE).take, writer(CHAT_SHAPE).piece):
        with pytest.raises(UnfinishedError):
            take(0, Piece("a", [1], FinishInfo("timeout", 1, 1, 0, 0.0)))


@pytest.mark.parametrize("shape", [CHAT_SHAPE, TEXT_SHAPE], ids=["chat", "completion"])
def test_the_bodies_are_what_was_kept(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, and as a stream, with log-probabilities: what clients parse."""
    monkeypatch.setattr("secrets.token_hex", lambda count: "0" * 2 * count)
    monkeypatch.setattr("time.time", lambda: 1_700_000_000.5)
    likely = TokenLogprob(7, -0.25, ((7, -0.25), (9, -1.5)))
    pieces = [Piece("The sky ", [7], logprobs=(likely,), offsets=(0,)), Piece("is blue.", [8, 9]), Piece("", [], END)]
    told, kept = writer(shape, stream_options=StreamOptions(usage=True)), writer(shape)
    stream = told.first() + "".join(told.piece(0, piece) for piece in pieces)
    for piece in pieces:
        kept.take(0, piece)
    name = shape.whole.replace(".", "_")
    assert_golden(f"openai/{name}.json", kept.whole())
    assert_golden(f"openai/{name}_stream.txt", stream)
