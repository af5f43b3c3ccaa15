"""What the python backend's model does with a request that cannot be answered, without a server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medusa_export.engines.serving.options import ServingOptions
from medusa_export.engines.serving.text_service import TextService
from medusa_export.engines.serving.triton.model import CODED, TWIN, MedusaModel


@pytest.mark.parametrize("is_coded", [False, True], ids=["the model", "its twin"])
def test_a_token_that_the_model_does_not_have_is_the_clients_fault(
    is_coded: bool, tiny_engine: Callable[..., Any]
) -> None:
    """The tokenizer has 97 tokens and the model 90: w85 is the token 90."""
    said: list[tuple[str, str]] = []
    model: Any = MedusaModel.__new__(MedusaModel)  # initialize() needs Triton's own module
    model._service = TextService(tiny_engine(vocab_size=90).path, ServingOptions())
    model._open, model._lock = {}, threading.Lock()
    model._meter = SimpleNamespace(refused=lambda code: None)
    text = SimpleNamespace(name=lambda: "text_input", as_numpy=lambda: np.array([b"w3 w85"], object))
    request = SimpleNamespace(
        parameters=lambda: f'{{"{TWIN}": true}}' if is_coded else "{}", request_id=lambda: "1", inputs=lambda: [text]
    )
    try:
        model._take(request, SimpleNamespace(error=lambda code, message: said.append((code, message))))
    finally:
        model._service.close()
    ((code, message),) = said
    assert code == "INVALID_ARG"
    assert message.removeprefix(f"INVALID_ARG{CODED}" if is_coded else "").startswith(
        "prompt: got the token 90; expected ids below the model's vocab_size 90"
    )
    assert not model._open


@pytest.mark.parametrize("words", [b"", b" \n "])
def test_a_text_without_words_is_refused(words: bytes) -> None:
    said: list[tuple[str, str]] = []
    model: Any = MedusaModel.__new__(MedusaModel)
    model._service = SimpleNamespace(options=ServingOptions(), end_ids=[], submit=lambda *_: pytest.fail("it is taken"))
    model._open, model._lock = {}, threading.Lock()
    model._meter = SimpleNamespace(refused=lambda code: None)
    text = SimpleNamespace(name=lambda: "text_input", as_numpy=lambda: np.array([words], object))
    request = SimpleNamespace(parameters=lambda: "{}", request_id=lambda: "1", inputs=lambda: [text])
    model._take(request, SimpleNamespace(error=lambda code, message: said.append((code, message))))
    ((code, message),) = said
    assert code == "INVALID_ARG"
    assert message.startswith("text: got nothing; expected a question")
