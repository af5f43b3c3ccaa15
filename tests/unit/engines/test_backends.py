"""Engines opened by their backend; and names that artefacts written earlier import stay importable."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medusa_export.core.errors import ConfigError
from medusa_export.engines import backends
from medusa_export.engines.decoding.protocols import Generation
from medusa_export.engines.serving.triton import repository


def test_sequences_in_slots(tiny_engine: Callable[..., Any]) -> None:
    assert backends.open_decoder(tiny_engine().path, slots=3).slots == 3


def test_a_runtime_that_decodes_whole_answers_has_no_slots(
    tiny_engine: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Whole:
        """A stand-in for TensorRT-LLM's engine."""

        info = None

        def decode(self, *_: Any, **__: Any) -> Generation:
            raise AssertionError

    body = json.loads((tiny_engine().path / "engine.json").read_text()) | {"backend": "tensorrt-llm"}
    (tmp_path / "engine.json").write_text(json.dumps(body))
    backend = backends.Backend(lambda path, options: Whole())
    monkeypatch.setitem(backends.BACKENDS, "tensorrt-llm", backend)
    with pytest.raises(ConfigError, match="got an engine for tensorrt-llm, whose runtime decodes whole answers itself"):
        backends.open_decoder(tmp_path, slots=3)


@pytest.mark.parametrize("name", ["triton_model:MedusaModel", "triton_unary:UnaryModel"])
def test_models_of_triton_repositories_that_were_written_before(name: str) -> None:
    module, _, attribute = name.partition(":")
    old = getattr(importlib.import_module(f"medusa_export.engines.{module}"), attribute)
    new = "model" if attribute == "MedusaModel" else "unary"
    assert old is getattr(importlib.import_module(f"medusa_export.engines.serving.triton.{new}"), attribute)


@pytest.mark.parametrize("model", ["model", "model_unary"])
def test_models_of_triton_repositories_that_are_written_now(model: str) -> None:
    found = re.search(r"from (\S+) import (\S+) as TritonPythonModel", repository.model_code(model, "model"))
    assert found is not None
    assert hasattr(importlib.import_module(found[1]), found[2])
