"""What the model in front of TensorRT-LLM refuses, without a server: Triton's module is a stand-in."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medusa_export.core.text.encoding import encode_chat
from medusa_export.core.text.tokenizer import read_tokenizer
from medusa_export.engines.serving.triton_trtllm.model_preprocessing import TritonPythonModel

VOCAB = 90  # rows of the embedding; the tokenizer has 97 tokens, and w85 is the token 90


class Error(Exception):
    """Triton's."""

    INVALID_ARG, INTERNAL = "INVALID_ARG", "INTERNAL"


@pytest.fixture
def model(
    tmp_path: Path, tiny_tokenizer: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """``model(**inputs)``: the tensors of an answer, or its error."""
    pb = SimpleNamespace(
        TritonError=Error,
        Tensor=lambda name, array: (name, array),
        InferenceResponse=lambda output_tensors=(), error=None: (
            dict(output_tensors) | ({"error": error} if error else {})
        ),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", pb)  # type: ignore[arg-type]
    tiny_tokenizer(tmp_path / "1" / "tokenizer")
    made = TritonPythonModel()
    numbers = {"eos_token_ids": "2", "max_seq_len": "64", "max_text_bytes": "100", "vocab_size": str(VOCAB)}
    parameters = ", ".join(f'"{name}": {{"string_value": "{value}"}}' for name, value in numbers.items())
    made.initialize(
        {"model_config": f'{{"parameters": {{{parameters}}}}}', "model_repository": str(tmp_path), "model_version": "1"}
    )

    def ask(**inputs: Any) -> dict[str, Any]:
        tensors = [_tensor(name, value) for name, value in {"max_tokens": 4, **inputs}.items()]
        (answer,) = made.execute([SimpleNamespace(inputs=lambda: tensors)])
        return dict(answer)

    return ask


def _tensor(name: str, value: Any) -> Any:
    array = np.array(
        [[value.encode() if isinstance(value, str) else value]], object if isinstance(value, str) else None
    )
    return SimpleNamespace(name=lambda: name, as_numpy=lambda: array)


def test_ids_are_those_of_every_other_command(model: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    tokenizer = read_tokenizer(tmp_path / "1" / "tokenizer")
    found = model(text_input="w3 w84")
    assert found["input_ids"].tolist() == [encode_chat(tokenizer, [{"role": "user", "content": "w3 w84"}])]
    assert found["request_output_len"].tolist() == [[4]]


@pytest.mark.parametrize("chat", [True, False])
def test_a_token_that_the_model_does_not_have(chat: bool, model: Callable[..., dict[str, Any]]) -> None:
    """The engine would read behind its embedding."""
    error = model(text_input="w3 w85", chat=chat)["error"]
    assert error.args == (f"text_input: got the token {VOCAB}; expected ids below {VOCAB}; leave it out", "INVALID_ARG")
    assert "error" not in model(text_input="w3 w84", chat=chat)
