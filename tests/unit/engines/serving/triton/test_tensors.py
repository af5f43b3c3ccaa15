"""What a request's tensors may be, and what an answer's are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.engines.serving.triton.tensors import INPUTS, OUTPUTS, read_inputs, write_outputs


def text(*values: bytes) -> Any:
    return np.array(values, dtype=object)


def test_values() -> None:
    arrays = {
        "text_input": text("naïve".encode()),
        "max_tokens": np.array([7], np.int64),
        "temperature": np.array([0.5], np.float32),
        "chat": np.array([False]),
        "stop": text(b"a", b"b"),
    }
    expected = {"text_input": "naïve", "max_tokens": 7, "temperature": 0.5, "chat": False, "stop": ["a", "b"]}
    assert read_inputs(arrays) == expected
    assert [type(value) for value in read_inputs(arrays).values()] == [str, int, float, bool, list]


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("max_tokens", np.array([7], np.int32), "max_tokens: got int32; expected a tensor of INT64"),
        ("max_tokens", np.array([7, 8], np.int64), "max_tokens: got 2 values; expected one"),
        ("max_tokens", np.array([], np.int64), "max_tokens: got 0 values"),
        ("text_input", text(b"a\xff"), "no UTF-8"),
        ("stop", text(b"a", b"\xc3"), "stop: got bytes that are no UTF-8"),
        ("nonsense", np.array([1]), "input: got nonsense; expected one of text_input, system"),
    ],
)
def test_refusals(name: str, array: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_inputs({"text_input": text(b"hello"), name: array})


def test_a_missing_text() -> None:
    with pytest.raises(ConfigError, match="text_input: got nothing"):
        read_inputs({"max_tokens": np.array([7], np.int64)})


def test_outputs() -> None:
    values = {"text_output": "é", "token_ids": [5, 6], "finish_reason": "", "prompt_tokens": 3, "completion_tokens": 2}
    arrays = write_outputs(values | {"tokens_per_step": 1.5})
    assert list(arrays) == [port.name for port in OUTPUTS]
    assert arrays["text_output"].tolist() == ["é".encode()]
    assert (arrays["token_ids"].dtype, arrays["token_ids"].tolist()) == (np.int32, [5, 6])
    assert arrays["tokens_per_step"].tolist() == [1.5]
    assert write_outputs(values | {"tokens_per_step": 0.0, "token_ids": []})["token_ids"].shape == (0,)


def test_names_are_used_once() -> None:
    for ports in (INPUTS, OUTPUTS):
        assert len({port.name for port in ports}) == len(ports)
