"""What a request may say, in NVIDIA's names and types: read, settled, and refused by name where it would change the answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.engines.serving.triton.dialect import GREEDY, UNHONOURED, read_inputs, settle
from medusa_export.engines.serving.triton.tensors import DTYPES, INPUTS

END_IDS = (2, 7)


def text(*values: bytes) -> Any:
    return np.array(values, dtype=object)


def test_values() -> None:
    arrays = {
        "text_input": text("naïve".encode()),
        "max_tokens": np.array([[7]], np.int32),
        "temperature": np.array([[0.5]], np.float32),
        "chat": np.array([False]),
        "stop": text(b"a", b"b"),
    }
    expected = {"text_input": "naïve", "max_tokens": 7, "temperature": 0.5, "chat": False, "stop": ["a", "b"]}
    assert read_inputs(arrays, INPUTS) == expected
    assert [type(value) for value in read_inputs(arrays, INPUTS).values()] == [str, int, float, bool, list]
    old = {**arrays, "max_tokens": np.array([7], np.int64)}  # as repositories of before version 0.2 have it
    assert read_inputs(old, INPUTS) == expected


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("max_tokens", np.array([7.0], np.float32), "max_tokens: got float32; expected a tensor of INT32"),
        ("max_tokens", np.array([7, 8], np.int32), "max_tokens: got 2 values; expected one"),
        ("max_tokens", np.array([], np.int32), "max_tokens: got 0 values"),
        ("text_input", text(b"a\xff"), "no UTF-8"),
        ("stop_words", text(b"a", b"\xc3"), "stop_words: got bytes that are no UTF-8"),
        ("nonsense", np.array([1]), "input: got nonsense; expected one of text_input, max_tokens"),
    ],
)
def test_unreadable(name: str, array: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_inputs({"text_input": text(b"hello"), name: array}, INPUTS)


def test_what_nvidias_clients_send_empty_is_taken() -> None:
    arrays = {
        "text_input": text(b"hello"),
        "embedding_bias_words": text(b""),
        "embedding_bias_weights": np.array([[0.0]], np.float32),
        "prompt_embedding_table": np.zeros((1, 0, 64), np.float16),
        "prompt_vocab_size": np.array([[0]], np.int32),
        "prompt_table_extra_id": np.array([[7]], np.uint64),
        "lora_weights": np.zeros((1, 0, 8), np.float16),
        "lora_config": np.zeros((1, 0, 3), np.int32),
    }
    found = settle(read_inputs(arrays, INPUTS), END_IDS)
    assert (found["embedding_bias_words"], found["prompt_embedding_table"]) == ([""], [])
    table = np.ones((1, 2, 64), np.float16)
    with pytest.raises(ConfigError, match="prompt_embedding_table: got 128 values"):
        settle(read_inputs({**arrays, "prompt_embedding_table": table}, INPUTS), END_IDS)


def test_a_missing_text() -> None:
    with pytest.raises(ConfigError, match="text_input: got nothing"):
        read_inputs({"max_tokens": np.array([7], np.int32)}, INPUTS)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"temperature": 0.0, "stop": [], "ignore_eos": False}),
        ({"stop": ["a"], "stop_words": ["", "b"]}, {"stop": ["a", "b"]}),
        ({"random_seed": 5}, {"seed": 5}),
        ({"random_seed": 5, "seed": 5}, {"seed": 5}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"top_k": 1, "temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0}),
        ({"top_k": 5}, {"temperature": 1.0}),
        ({"top_p": 0.9}, {"temperature": 1.0}),
        ({"top_p": 0.9, "temperature": 0.0}, {"temperature": 0.0}),
        ({"top_k": 0, "top_p": 0.0}, {"temperature": 0.0}),
        ({"end_id": 7}, {"ignore_eos": False}),
        ({"end_id": -1}, {"ignore_eos": True}),
        ({"bad_words": [""], "beam_width": 1, "pad_id": 5, "length_penalty": 2.0}, {}),
    ],
)
def test_settled(values: dict[str, Any], expected: dict[str, Any]) -> None:
    found = settle(values, END_IDS)
    assert {name: found[name] for name in expected} == expected
    assert not found.keys() & {"stop_words", "random_seed", "end_id"}
    assert found.get("top_p", 1) > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"end_id": 3}, "end_id: got 3; expected 2, 7, or -1 for no end"),
        ({"bad_words": ["", "x"]}, "bad_words: got .*'x'.*; expected none"),
        ({"beam_width": 4}, "beam_width: got 4; expected 1"),
        ({"num_return_sequences": 2}, "num_return_sequences: got 2; expected 1"),
        ({"exclude_input_in_output": False}, "exclude_input_in_output: got false; expected true"),
        ({"return_context_logits": True}, "return_context_logits: got true; expected false"),
        ({"random_seed": 4, "seed": 3}, "random_seed: got 4; expected 3, as seed says"),
        ({"embedding_bias_words": ["x"]}, "embedding_bias_words: got .*'x'.*; expected none: logits"),
        ({"embedding_bias_weights": [0.0, 0.5]}, "embedding_bias_weights: got .*0.5.*; expected 0s, or none"),
        ({"prompt_embedding_table": [0.0] * 4096}, "prompt_embedding_table: got 4096 values; expected none: a prompt"),
        ({"prompt_vocab_size": 1}, "prompt_vocab_size: got 1; expected 0: a prompt is text"),
        ({"decoder_text_input": "x"}, "decoder_text_input: got x; expected none: the model has no encoder"),
        ({"return_num_input_tokens": True}, "return_num_input_tokens: got true; expected false"),
        ({"guided_decoding_guide": "{}"}, "guided_decoding_guide: got {}; expected none: answers are not guided"),
        ({"lora_task_id": 1}, "lora_task_id: got 1; expected 0: there are no LoRA"),
        ({"lora_weights": [0.0]}, "lora_weights: got .*; expected none: there are no LoRA"),
    ],
)
def test_what_would_change_the_answer(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settle(values, END_IDS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.7}, "temperature: got 0.7; expected 0, or top_k 1"),
        ({"top_k": 50}, "temperature: got 1; expected 0, or top_k 1"),
        ({"repetition_penalty": 1.2}, "repetition_penalty: got 1.2; expected 1"),
        ({"presence_penalty": 0.1}, "presence_penalty: got 0.1; expected 0"),
        ({"frequency_penalty": -0.1}, "frequency_penalty: got -0.1; expected 0"),
        ({"min_tokens": 2}, "min_tokens: got 2; expected 0 or 1"),
        ({"return_log_probs": True}, "return_log_probs: got true; expected false"),
    ],
)
def test_what_a_greedy_engine_cannot(values: dict[str, Any], message: str) -> None:
    settle(values, END_IDS)
    with pytest.raises(ConfigError, match=message):
        settle(values, END_IDS, GREEDY)


def test_a_greedy_engine_takes_what_changes_nothing() -> None:
    neutral = {
        "top_k": 1,
        "temperature": 0.7,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "min_tokens": 1,
        "seed": 3,
    }
    assert settle(neutral, END_IDS, GREEDY)["temperature"] == 0


def test_every_limit_is_of_an_input_that_can_be_given() -> None:
    names = {port.name for port in INPUTS}
    assert UNHONOURED.keys() | GREEDY.keys() <= names
    assert {port.data_type for port in INPUTS} <= DTYPES.keys()
